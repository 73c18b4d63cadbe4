"""Every kind of adapter, read and written against PEFT itself: the same logits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nybble
from nybble import LoRAConfig, LoRALinear, add_lora
from nybble.checkpoint.peft import adapted_layers, lora_layers
from nybble.errors import CheckpointError, PatternError
from nybble.nn import add_prefix, add_prompt
from nybble.nn.adapters import adapter_parameters, delete_adapter
from nybble.nn.virtual import virtual_tokens

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
Make = Callable[..., Path]


def logits(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits.float()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """fp32 models: the same up to the order of summation."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


def plain(directory: Path) -> Any:
    return nybble.load(directory)


def dequantized(directory: Path) -> Any:
    """The model that a quantized directory stands for, in fp32, as PEFT takes it."""
    model = nybble.load(directory)
    for name, module in list(model.named_modules()):
        if isinstance(module, nybble.QuantLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.dequantize(torch.float32)
            model.set_submodule(name, linear)
    return model


@pytest.fixture(params=["fp32", "nf4"])
def pair(request: pytest.FixtureRequest, make: Make, tmp_path: Path) -> tuple[Any, Callable[[], Any]]:
    """(the model for PEFT, a function that makes ours)."""
    base = make(dtype=torch.float32)
    if request.param == "fp32":
        return plain(base), lambda: plain(base)
    nybble.quantize(base, tmp_path / "nf4")
    return dequantized(tmp_path / "nf4"), lambda: nybble.load(tmp_path / "nf4")


KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 6}, "alpha_pattern": {"v_proj": 32}},
    "dora patterns rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"k_proj": 1}},
    "head in full": {"modules_to_save": ["lm_head"]},
    "norms in full": {"modules_to_save": ["input_layernorm"], "target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


def randomize(model: torch.nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_we_read_pefts_and_peft_reads_ours(
    pair: tuple[Any, Callable[[], Any]], tmp_path: Path, token_ids: torch.Tensor, kind: str
) -> None:
    base, make_ours = pair
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], **KINDS[kind]}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs, token_ids)
    ours = make_ours()
    assert not torch.allclose(logits(ours, token_ids), expected, atol=1e-3)
    nybble.load_adapter(ours, tmp_path / "theirs")
    assert_close(logits(ours, token_ids), expected)
    nybble.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_close(logits(again, token_ids), expected)
    third = make_ours()
    nybble.load_adapter(third, tmp_path / "ours")
    assert torch.equal(logits(third, token_ids), logits(ours, token_ids))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["prefix", "projected prefix", "prompt"])
def test_virtual_tokens_both_ways(
    pair: tuple[Any, Callable[[], Any]], tmp_path: Path, token_ids: torch.Tensor, kind: str
) -> None:
    base, make_ours = pair
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    if kind == "prompt":
        config = peft.PromptTuningConfig(**common)
    else:
        config = peft.PrefixTuningConfig(**common, prefix_projection=kind != "prefix", encoder_hidden_size=32)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    mask = torch.ones_like(token_ids)
    expected = logits(theirs, token_ids, attention_mask=mask)[:, -token_ids.shape[1] :]  # ours are the text's
    ours = make_ours()
    before = logits(ours, token_ids)
    nybble.load_adapter(ours, tmp_path / "theirs")
    assert_close(logits(ours, token_ids, attention_mask=mask), expected)
    assert_close(logits(ours, token_ids), expected)  # without a mask too
    nybble.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_close(logits(again, token_ids, attention_mask=mask)[:, -token_ids.shape[1] :], expected)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = theirs.generate(input_ids=token_ids, attention_mask=mask, **settings)
    assert torch.equal(ours.generate(input_ids=token_ids, attention_mask=mask, **settings), generated)
    delete_adapter(ours, "default")
    assert torch.equal(logits(ours, token_ids), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_of_left_padded_texts_and_trained_gradients_are_pefts(
    make: Make, tmp_path: Path, token_ids: torch.Tensor, kind: str
) -> None:
    base = plain(make(dtype=torch.float32))
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    config = peft.PromptTuningConfig(**common) if kind == "prompt" else peft.PrefixTuningConfig(**common)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    mask = torch.ones_like(token_ids)
    mask[0, :3] = 0
    nybble.load_adapter(base, tmp_path / "theirs")
    length = token_ids.shape[1]
    ours, expected = (m(input_ids=token_ids, attention_mask=mask).logits[:, -length:] for m in (base, theirs))
    seen = mask.bool()
    assert_close(ours[seen], expected[seen])
    ours[seen].sin().sum().backward()
    expected[seen].sin().sum().backward()
    own = virtual_tokens(base)
    assert own is not None
    tokens: Any = own.adapters["default"]
    for parameter in tokens.parameters():  # so that `flat` gives the gradient in PEFT's layout
        parameter.data = parameter.grad
    grad = tokens.flat() if kind == "prefix" else tokens.embeddings
    assert_close(grad.detach(), theirs.prompt_encoder["default"].embedding.weight.grad)


@pytest.mark.parametrize("add", [add_prefix, add_prompt])
def test_virtual_tokens_train(make: Make, token_ids: torch.Tensor, add: Callable[..., Any]) -> None:
    model = nybble.load(make(dtype=torch.float32))
    nybble.quantize_(model)
    torch.manual_seed(0)
    add(model, tokens=4)
    with pytest.raises(ValueError, match=r"model has a (prefix|prompt) 'default' already"):
        add(model, tokens=4)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == adapter_parameters(model, "default").keys()
    assert all(name.startswith("model.nybble_virtual.adapters.default.") for name in trained)
    optimizer = torch.optim.Adam(trained.values(), lr=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_dora_starts_as_its_base_and_trains_what_dora_trains() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 80)
    for base in (linear, nybble.QuantLinear.from_linear(linear, nybble.QuantConfig(block_size=32))):
        layer = LoRALinear.from_base(copy.deepcopy(base), r=3, alpha=6, dora=True)
        x = torch.randn(7, 96)
        torch.testing.assert_close(layer(x), base(x), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            layer.lora_B.normal_()
            layer.lora_magnitude.mul_(1.1)
        weight = base.dequantize() if isinstance(base, nybble.QuantLinear) else base.weight.detach()
        a, b, m = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude))
        update = weight + layer.scaling * (b @ a)
        norm = update.norm(dim=1).detach()
        expected = (m / norm)[:, None] * update
        y, reference = layer(x), x @ expected.T + layer.base.bias
        torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-4)
        g = torch.randn_like(y)
        y.backward(g)
        reference.backward(g)
        for ours, theirs in ((layer.lora_A, a), (layer.lora_B, b), (layer.lora_magnitude, m)):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
        layer.adapter().dropout = 0.5
        layer.train()
        mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
        torch.testing.assert_close(mean, reference, rtol=0.1, atol=0.25)
        copied = copy.deepcopy(layer.eval())
        assert torch.equal(copied(x), layer(x))


def test_patterns_and_modules_in_full_by_add_lora(make: Make, tmp_path: Path, token_ids: torch.Tensor) -> None:
    model = nybble.load(make(dtype=torch.float32, tied=True))
    config = LoRAConfig(
        r=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"*.mlp.*": 3}, modules_to_save=("lm_head", "norm")
    )
    add_lora(model, config)
    layers = lora_layers(model)
    assert {layer.r for path, layer in layers.items() if "q_proj" in path} == {2}
    assert {layer.alpha for path, layer in layers.items() if ".mlp." in path} == {3}
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad and not model.model.embed_tokens.weight.requires_grad
    randomize(model)
    nybble.save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["modules_to_save"] == [
        "model.norm",
        "lm_head",
    ]
    other = nybble.load(make("again", dtype=torch.float32, tied=True))
    nybble.load_adapter(other, tmp_path / "a")
    assert torch.equal(logits(other, token_ids), logits(model, token_ids))
    assert len(adapted_layers(other)) == 14
    with pytest.raises(PatternError, match="modules_to_save: pattern 'nothing'"):
        add_lora(nybble.load(make("third")), LoRAConfig(modules_to_save=("nothing",)))
    with pytest.raises(ValueError, match="rank_pattern, alpha_pattern: 'q_proj': r is 0"):
        LoRAConfig(rank_pattern={"q_proj": 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": "8"}, "lora_alpha = '8', a positive number is needed"),
        ({"lora_dropout": 1.5}, r"lora_dropout = 1.5, a number in \[0, 1\)"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern = .* name patterns with positive numbers"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern has '\(', which is no regular expression"),
        ({"use_dora": "yes"}, "use_dora = 'yes', true or false"),
        ({"modules_to_save": [1]}, "modules_to_save = .* a list of names"),
        ({"peft_type": "PREFIX_TUNING"}, "exactly 'prompt_embeddings' is needed"),
    ],
)
def test_bad_values_name_the_file_and_the_key(
    make: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = nybble.load(make(dtype=torch.float32))
    add_lora(model, LoRAConfig(r=2))
    nybble.save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    fresh = nybble.load(make("fresh", dtype=torch.float32))
    with pytest.raises(CheckpointError, match=message):
        nybble.load_adapter(fresh, tmp_path / "a")
    assert not adapted_layers(fresh)


def test_a_prefix_that_does_not_fit(make: Make, tmp_path: Path) -> None:
    model = nybble.load(make(dtype=torch.float32))
    add_prefix(model, tokens=3)
    nybble.save_adapter(model, tmp_path / "a")
    values = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file(
        {"prompt_embeddings": values["prompt_embeddings"][:, :8].clone()}, tmp_path / "a" / "adapter_model.safetensors"
    )
    fresh = nybble.load(make("fresh", dtype=torch.float32))
    with pytest.raises(
        CheckpointError, match=r"'prompt_embeddings' is F32 \[3, 8\], the model wants floats \[3, 128\]"
    ):
        nybble.load_adapter(fresh, tmp_path / "a")
    assert virtual_tokens(fresh) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4: BERT has no attention interface")
@pytest.mark.parametrize("padded", [False, True])
def test_a_prefix_of_an_encoder_is_pefts(tmp_path: Path, padded: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, vocab_size=64, initializer_range=0.2)
    ours = transformers.BertModel(config).eval()
    settings = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    theirs = peft.get_peft_model(copy.deepcopy(ours), settings).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    nybble.load_adapter(ours, tmp_path / "theirs", name="p")
    ids, mask = torch.randint(1, 64, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    if padded:
        mask[1, 4:] = 0
    with torch.no_grad():
        actual = ours(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    assert_close(actual[mask.bool()], expected[mask.bool()])


def test_virtual_tokens_by_name_and_of_a_network(make: Make, tmp_path: Path, token_ids: torch.Tensor) -> None:
    model = nybble.load(make(dtype=torch.float32))
    expected = {}
    for name, add, options in (
        ("network", add_prefix, {"projection": True, "projection_size": 6}),
        ("prefix", add_prefix, {}),
        ("prompt", add_prompt, {}),
    ):
        add(model, name=name, tokens=3, **options)
        expected[name] = logits(model, token_ids)
        nybble.save_adapter(model, tmp_path / name, name=name)
        settings = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert settings["num_virtual_tokens"] == 3 and settings.get("prefix_projection", False) is False
    fresh = nybble.load(make("fresh", dtype=torch.float32))
    for name in expected:
        nybble.load_adapter(fresh, tmp_path / name, name=name)
    for name, values in expected.items():
        nybble.set_adapter(fresh, name)
        assert_close(logits(fresh, token_ids), values)
    randomize(fresh)
    for name in ("prefix", "prompt"):  # into those that are there
        nybble.load_adapter(fresh, tmp_path / name, name=name)
        assert_close(logits(fresh, token_ids), expected[name])
    with pytest.raises(
        CheckpointError, match=r"adapter 'network' is a prefix of 3 virtual tokens computed by a network"
    ):
        nybble.load_adapter(model, tmp_path / "prefix", name="network")
    with pytest.raises(
        CheckpointError, match=r"adapter 'prompt' is a prompt of 3 virtual tokens, the file's is PREFIX"
    ):
        nybble.load_adapter(model, tmp_path / "prefix", name="prompt")
    nybble.set_adapter(model, "prefix")
    assert torch.equal(logits(model, token_ids), expected["prefix"])  # nothing changed


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (add_prefix, "a prefix is keys and values beside those of the text, and no change of a weight"),
        (add_prompt, "a prompt is embeddings before those of the text, and no change of a weight"),
    ],
)
def test_merging_virtual_tokens_is_refused_with_the_reason(
    make: Make, tmp_path: Path, add: Callable[..., Any], reason: str
) -> None:
    base = make(dtype=torch.float32)
    model = nybble.load(base)
    add(model, tokens=2)
    nybble.save_adapter(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match=reason):
        nybble.merge(base, tmp_path / "a", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": "3"}, "num_virtual_tokens = '3', a positive integer is needed"),
        ({"num_virtual_tokens": 4}, r"the model wants floats \[4, 64\]"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules must be 1"),
        ({"peft_type": "PREFIX_TUNING"}, r"the model wants floats \[3, 128\]"),
    ],
)
def test_damaged_prompts_are_named(make: Make, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    model = nybble.load(make(dtype=torch.float32))
    add_prompt(model, tokens=3)
    nybble.save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    fresh = nybble.load(make("fresh", dtype=torch.float32))
    trains = [parameter.requires_grad for parameter in fresh.parameters()]
    with pytest.raises(CheckpointError, match=message):
        nybble.load_adapter(fresh, tmp_path / "a")
    assert virtual_tokens(fresh) is None and [p.requires_grad for p in fresh.parameters()] == trains
