"""Bottleneck adapters: where they stand, what they compute and its gradient, beside other adapters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import BASES, KINDS, assert_near, build, checkpointing, dequantized, gradients, ids, output, randomize

import nybble
from nybble import BottleneckConfig, add_bottleneck, add_lora
from nybble.checkpoint.bottleneck import bottlenecks_of
from nybble.errors import PatternError
from nybble.nn import BottleneckAdapter, LoRALinear, QuantLinear
from nybble.nn.adapters import Adapted, adapters, delete_adapter, set_adapter, use_adapter
from nybble.nn.bottleneck import ACTIVATIONS, Bottleneck
from nybble.nn.sublayers import find_sublayers

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
SMALL_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
MOE = {**SMALL, "intermediate_size": 64, "num_experts_per_tok": 2, "num_key_value_heads": 2}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
# configuration, ends of attention, ends of feed-forward
ARCHITECTURES: dict[str, tuple[dict[str, Any], str, Any]] = {
    "Llama": ({**SMALL, "intermediate_size": 64}, "self_attn.o_proj", "mlp.down_proj"),
    "Phi": ({**SMALL, "intermediate_size": 64}, "self_attn.dense", "mlp.fc2"),
    "Bert": ({**SMALL, "intermediate_size": 64}, "attention.output.dense", "output.dense"),
    "DebertaV2": ({**SMALL, "intermediate_size": 64}, "attention.output.dense", "output.dense"),
    "DistilBert": ({"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}, "attention.out_lin", "ffn.lin2"),
    "GPTNeoX": (
        {**SMALL, "intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 0},
        "attention.dense",
        "mlp.dense_4h_to_h",
    ),
    "OPT": ({**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}, "self_attn.out_proj", "fc2"),
    "GPT2": (SMALL_GPT, "attn.c_proj", "mlp.c_proj"),
    "GPTJ": ({**SMALL_GPT, "rotary_dim": 4}, "attn.out_proj", "mlp.fc_out"),
    "Falcon": ({**SMALL, "bos_token_id": 0, "eos_token_id": 0}, "self_attention.dense", "mlp.dense_4h_to_h"),
    "Bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "self_attention.dense", "4h_to_h"),
    "Mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64}, "attn.out_proj", "ffn.down_proj"),
    "Mixtral": ({**MOE, "num_local_experts": 4}, "self_attn.o_proj", ("mlp", "block_sparse_moe")),
    "GptOss": ({**MOE, "num_local_experts": 4, "head_dim": 8, "pad_token_id": 0}, "self_attn.o_proj", "mlp"),
    "Albert": ({**SMALL, "embedding_size": 16, "intermediate_size": 64}, "attention.dense", "ffn_output"),
    "T5": ({"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 64}, "o", "wo"),
    "Bart": (BART, "out_proj", "fc2"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sublayers_of_an_architecture(architecture: str) -> None:
    settings, attention, feed_forward = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**settings)
    model = transformers.AutoModel.from_config(config).eval()
    found = find_sublayers(model)
    assert all(name.endswith(attention) for name in found.attention) and found.attention
    assert all(name.endswith(feed_forward) for name in found.feed_forward) and found.feed_forward
    assert not set(found.attention) & set(found.feed_forward)
    tokens = torch.arange(3, 8)[None]
    inputs = {"input_ids": tokens, **({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})}
    with torch.no_grad():
        before = model(**inputs)[0]
        assert add_bottleneck(model, size=4, activation="tanh").targets
        assert torch.equal(model(**inputs)[0], before)
    after = model(**inputs)[0]
    (after * torch.randn_like(after)).sum().backward()
    held: Any = [m.adapters["default"] for m in model.modules() if isinstance(m, BottleneckAdapter)]
    assert len(held) == len(found.attention) + len(found.feed_forward)
    assert all(bottleneck.up_weight.grad.abs().max() > 0 for bottleneck in held)  # every one is reached


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_base_bit_for_bit(kind: str, base: str) -> None:
    model = build(kind, base)
    before = output(model, ids())
    for placement, behind in (("houlsby", 4), ("pfeiffer", 2)):
        report = add_bottleneck(model, name=placement, placement=placement, size=8, activation="gelu")
        assert len(report.targets) == behind and f"behind {behind} modules" in str(report)
        assert torch.equal(output(model, ids()), before)
        delete_adapter(model, placement)
        assert not any(isinstance(module, Adapted) for module in model.modules())
        assert torch.equal(output(model, ids()), before)


def test_near_identity_is_near() -> None:
    model = build("llama")
    before = output(model, ids())
    add_bottleneck(model, init="near-identity", std=1e-3)
    after = output(model, ids())
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)
    for bottleneck in bottlenecks_of(model, "default").values():
        assert 0 < bottleneck.down_weight.abs().max() <= 2e-3 and 0 < bottleneck.up_weight.abs().max() <= 2e-3


# ---- what it computes ------------------------------------------------------------------------------------------------


def formula(y: torch.Tensor, p: dict[str, torch.Tensor], activation: str, scaling: float, norm: bool) -> torch.Tensor:
    """A bottleneck in plain torch."""
    x = y
    if norm:
        mean, variance = y.mean(-1, keepdim=True), y.var(-1, unbiased=False, keepdim=True)
        x = (y - mean) / (variance + 1e-5).sqrt() * p["norm_weight"] + p["norm_bias"]
    hidden = x @ p["down_weight"].T + p["down_bias"]
    hidden = {"relu": lambda h: h.clamp(min=0), "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
              "silu": lambda h: h * torch.sigmoid(h), "tanh": torch.tanh}[activation](hidden)  # fmt: skip
    return y + scaling * (hidden @ p["up_weight"].T + p["up_bias"])


@given(
    width=st.integers(1, 20),
    size=st.integers(1, 9),
    rows=st.integers(1, 7),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    scaling=st.sampled_from([1.0, 0.5, 3.0]),
    norm=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_value_and_gradients_are_the_formulas(
    width: int, size: int, rows: int, activation: str, scaling: float, norm: bool, seed: int
) -> None:
    # In float64, so that only a wrong formula makes a difference.
    torch.manual_seed(seed)
    config = BottleneckConfig(size=size, activation=activation, scaling=scaling, layer_norm=norm)
    bottleneck = Bottleneck(width, size, config).double()
    with torch.no_grad():
        for parameter in bottleneck.parameters():
            parameter.add_(torch.randn_like(parameter))
    y = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    own = {name: p.detach().clone().requires_grad_() for name, p in bottleneck.named_parameters()}
    y2 = y.detach().clone().requires_grad_()
    actual, expected = bottleneck(y), formula(y2, own, activation, scaling, norm)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    g = torch.randn_like(actual)
    actual.backward(g)
    expected.backward(g)
    for name, parameter in bottleneck.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(y.grad, y2.grad, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_in_a_model_is_that_of_hooks_on_a_plain_one(kind: str, base: str) -> None:
    model = build(kind, base)
    plain = dequantized(copy.deepcopy(model)).requires_grad_(False)
    names = add_bottleneck(model, size=8, activation="silu", scaling=0.5).targets
    randomize(model, "default")
    own = {
        name: {k: p.detach().clone().requires_grad_() for k, p in bottleneck.named_parameters()}
        for name, bottleneck in bottlenecks_of(model, "default").items()
    }
    for name in names:
        plain.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: formula(y, own[name], "silu", 0.5, False)
        )
    actual, expected = output(model, ids()), output(plain, ids())
    assert_near(actual, expected, 1e-4)
    actual.sin().mean().backward()
    expected.sin().mean().backward()
    for name, bottleneck in bottlenecks_of(model, "default").items():
        for leaf, parameter in bottleneck.named_parameters():
            assert parameter.grad is not None
            assert_near(parameter.grad, own[name][leaf].grad, 1e-3)  # type: ignore[arg-type]


def test_what_backward_keeps_is_the_output_and_the_small_activation() -> None:
    tokens, width, size = 50, 64, 4
    for activation, pieces in (("relu", 1), ("gelu", 2)):
        bottleneck = Bottleneck(width, size, BottleneckConfig(size=size, activation=activation))
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            if tensor.shape[:1] == (tokens,):
                kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            bottleneck(torch.randn(tokens, width, requires_grad=True))
        assert sum(kept.values()) <= tokens * (width + pieces * size)


def test_dropout_acts_in_training_only() -> None:
    model = build("llama")
    add_bottleneck(model, dropout=0.5)
    randomize(model, "default")
    assert torch.equal(output(model, ids()), output(model, ids()))
    model.train()
    assert not torch.equal(output(model, ids()), output(model, ids()))


# ---- rows, other adapters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_through_their_own(kind: str) -> None:
    model = build(kind, "nf4")
    add_bottleneck(model, name="a", size=8)
    add_bottleneck(model, name="b", size=3, placement="pfeiffer", activation="tanh", layer_norm=True)
    add_lora(model, r=2, name="c")
    for number, name in enumerate("abc"):
        randomize(model, name, seed=number)
    tokens = ids(6)
    which = ["b", None, "a", "c", "b", "a"]
    set_adapter(model, which)
    mixed = output(model, tokens)
    mixed.sin().mean().backward()
    together = {name: gradients(model, name) for name in "abc"}
    for name in ("a", "b", "c", None):
        rows = [i for i, row in enumerate(which) if row == name]
        with use_adapter(model, name):
            alone = output(model, tokens[rows])
            assert_near(mixed[rows], alone)
            if name is None:
                continue
            (alone.sin().sum() / mixed.numel()).backward()
        for path, grad in gradients(model, name).items():
            assert_near(together[name][path], grad, 1e-4)
    delete_adapter(model, "c")
    set_adapter(model, ["a", "b", None])
    with pytest.raises(ValueError, match=r"BottleneckAdapter: its input has shape .* chosen for 3 rows"):
        output(model, tokens[:2])


@pytest.mark.parametrize("first", ["lora", "bottleneck"])
def test_beside_lora_in_either_order(first: str) -> None:
    model = build("llama")
    before = output(model, ids())
    for kind in (first, "bottleneck" if first == "lora" else "lora"):
        if kind == "lora":
            add_lora(model, r=4, name="a")
            randomize(model, "a")
        else:
            add_bottleneck(model, size=8, name="b")
            randomize(model, "b")
    assert {info.name: info.kinds for info in adapters(model)} == {"a": ("lora",), "b": ("bottleneck",)}
    only_lora, only_bottleneck = build("llama"), build("llama")
    add_lora(only_lora, r=4, name="a")
    randomize(only_lora, "a")
    nybble.nn.adapters.adapter_parameters(only_lora, "a")
    for path, value in nybble.nn.adapters.adapter_parameters(model, "a").items():
        dict(only_lora.named_parameters())[path.replace(".base.adapters", ".adapters")].data.copy_(value)
    add_bottleneck(only_bottleneck, size=8, name="b")
    only_bottleneck.load_state_dict(model.state_dict(), strict=False)
    for path, value in bottlenecks_of(model, "b").items():
        bottlenecks_of(only_bottleneck, "b")[path].load_state_dict(value.state_dict())
    set_adapter(model, "a")
    assert torch.equal(output(model, ids()), output(only_lora, ids()))
    set_adapter(model, "b")
    assert torch.equal(output(model, ids()), output(only_bottleneck, ids()))
    module = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(module, BottleneckAdapter) and isinstance(module.base, LoRALinear)
    assert (module.in_features, module.out_features, module.weight.shape) == (128, 64, (64, 128))
    delete_adapter(model, first[0] if first == "bottleneck" else "a")
    delete_adapter(model, "b" if first == "lora" else "a")
    assert torch.equal(output(model, ids()), before)
    assert not any(isinstance(module, Adapted) for module in model.modules())


# ---- machinery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_gradient_checkpointing_gives_the_same_gradients(base: str) -> None:
    model = build("llama", base).train()
    add_bottleneck(model, size=8)
    randomize(model, "default")
    output(model, ids()).sin().mean().backward()
    expected = gradients(model, "default")
    checkpointing(model)
    output(model, ids(), use_cache=False).sin().mean().backward()
    for path, grad in gradients(model, "default").items():
        assert torch.equal(grad, expected[path])


def test_recomputing_with_another_adapter_is_refused() -> None:
    model = build("llama").train()
    add_bottleneck(model, size=8, name="a")
    add_bottleneck(model, size=8, name="b")
    checkpointing(model)
    loss = output(model, ids(), use_cache=False).sum()
    set_adapter(model, "a")
    with pytest.raises(RuntimeError, match="adapters were changed between forward"):
        loss.backward()


@pytest.mark.parametrize("base", BASES)
def test_autocast_and_bf16(base: str) -> None:
    model = build("llama", base)
    add_bottleneck(model, size=8, layer_norm=True)
    randomize(model, "default")
    expected = output(model, ids())
    with torch.autocast("cpu", torch.bfloat16):
        actual = output(model, ids())
    # bf16 has 8 bits; a few layers of it
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    actual.float().sin().mean().backward()
    assert all(grad.dtype == torch.float32 for grad in gradients(model, "default").values())
    model = build("llama", dtype=torch.bfloat16)
    add_bottleneck(model, size=8)
    assert output(model, ids()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")
def test_compiles_in_one_graph() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    for base in (linear, QuantLinear.from_linear(linear)):
        layer = BottleneckAdapter.from_base(base, BottleneckConfig(size=4))
        randomize(layer, "default")
        x = torch.randn(5, 64)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        compiled(x).sum().backward()
        assert layer.adapters["default"].up_weight.grad is not None


def test_copies_and_pickles() -> None:
    model = build("llama", "nf4")
    add_bottleneck(model, size=8)
    randomize(model, "default")
    expected = output(model, ids())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other, ids()), expected)
        set_adapter(other, None)
        assert not torch.equal(output(other, ids()), expected)
        assert torch.equal(output(model, ids()), expected)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is 0; it must be an integer of 1 or more"),
        ({"reduction": -1}, "reduction is -1; it must be a finite number above 0"),
        ({"placement": "both"}, "placement is 'both'; allowed are houlsby, pfeiffer"),
        ({"activation": "elu"}, "activation is 'elu'; allowed are relu, gelu, silu, tanh"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"init": "one"}, "init is 'one'; allowed are zero, near-identity"),
        ({"dtype": torch.int8}, "dtype is torch.int8; allowed are"),
        ({"target": ()}, "target is empty"),
        ({"scaling": float("nan")}, "scaling is nan"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**options)


def test_targets_by_name_and_what_is_refused() -> None:
    model = build("llama")
    assert add_bottleneck(model, target="*.0.mlp", reduction=16).targets == ["model.layers.0.mlp"]
    assert bottlenecks_of(model, "default")["model.layers.0.mlp"].size == 4
    with pytest.raises(ValueError, match="model has bottlenecks 'default' already"):
        add_bottleneck(model)
    with pytest.raises(PatternError, match="target: the pattern 'nothing' matches none"):
        add_bottleneck(model, name="b", target="nothing")
    with pytest.raises(ValueError, match=r"adapter name is 'a\.b'"):
        add_bottleneck(model, name="a.b")
    other = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    with pytest.raises(PatternError, match="Sequential: the ends of its feed-forward sublayers are not known; give"):
        add_bottleneck(other)
    with pytest.raises(ValueError, match="1 is a ReLU, which does not say how wide its output is"):
        add_bottleneck(other, target="1")
    assert add_bottleneck(other, target="0", size=2).targets == ["0"]
    fast = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"no adapter can stand behind linear2: nn\.TransformerEncoderLayer reads"):
        add_bottleneck(fast, target="linear2")
    model = build("llama")
    attention = build("llama")
    assert add_bottleneck(attention, target="self_attn", size=2).targets  # returns (output, weights)
    assert output(attention, ids()).shape == (2, 9, 256)
