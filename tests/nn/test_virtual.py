"""Prefixes and prompts: positions, masks, caches, packing, recomputation, rows of their own, and taking them away."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BASES, KINDS, assert_near, bert, build, checkpointing, gradients, ids, output, randomize
from tiny import llama

import nybble
from nybble.nn import add_bottleneck, add_lora, add_prefix, add_prompt
from nybble.nn.adapters import Adapted, adapters, delete_adapter, set_adapter, use_adapter
from nybble.nn.positions import Positions
from nybble.nn.virtual import virtual_tokens

transformers = pytest.importorskip("transformers")

METHODS: dict[str, Callable[..., Any]] = {"prefix": add_prefix, "prompt": add_prompt}
TEXT = [5, 9, 77, 31]
IMPLEMENTATIONS = ("sdpa", "eager")
each_method = pytest.mark.parametrize("method", METHODS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def with_text(tokens: torch.Tensor) -> torch.Tensor:
    """The tokens behind TEXT."""
    return torch.cat([torch.tensor([TEXT]).expand(len(tokens), -1), tokens], 1)


def need_interface(method: str, kind: str) -> None:
    """Skips the test where a prefix cannot reach the attention: transformers 4 computes BERT's past its interface."""
    if method == "prefix" and kind == "bert" and transformers.__version__.startswith("4."):
        pytest.skip("no attention interface")


def adapted(method: str, kind: str = "llama", base: str = "fp32", name: str = "default", **changes: Any) -> Any:
    """A model with virtual tokens that have been moved at random."""
    need_interface(method, kind)
    model = build(kind, base, **changes)
    METHODS[method](model, tokens=4, name=name)
    randomize(model, name)
    return model


# ---- what it means: a text before the text ---------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("base", BASES)
@each_method
def test_of_a_text_is_the_text_in_front(method: str, base: str, implementation: str) -> None:
    # A causal model cannot tell them apart: keys, values, positions and masks must all be right.
    model = build("llama", base, attn_implementation=implementation)
    before = output(model, ids())
    full = output(model, with_text(ids()))[:, 4:]
    report = METHODS[method](model, tokens=4, text=TEXT)
    assert f"{method} of 4 virtual tokens" in str(report) and report.trainable == (512 if method == "prefix" else 256)
    assert_near(output(model, ids()), full, 1e-5)
    assert_near(output(model, ids(), attention_mask=torch.ones(2, 9)), full, 1e-5)
    delete_adapter(model, "default")
    assert torch.equal(output(model, ids()), before)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    "architecture", ["GPT2", "GPTNeoX", "OPT", "Phi", "Qwen3", "Gemma2", "Mistral", "Roberta", "Bert", "BioGpt"]
)
@pytest.mark.filterwarnings("ignore")
@each_method
def test_of_a_text_in_other_architectures(method: str, architecture: str) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.2,
    }  # fmt: skip
    if architecture == "GPT2":
        settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 256, "initializer_range": 0.2}
    elif architecture == "OPT":
        settings = {**settings, "ffn_dim": 64, "word_embed_proj_dim": 16, "init_std": 0.2}
    elif architecture in ("Gemma2", "Qwen3", "Mistral"):
        settings = {**settings, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}
    elif architecture in ("Roberta", "Bert"):
        settings = {**settings, "is_decoder": True}
    model = transformers.AutoModel.from_config(
        getattr(transformers, f"{architecture}Config")(**settings), attn_implementation="eager"
    ).eval()
    tokens = ids().clamp(min=2)
    mask = torch.ones_like(tokens)
    full = output(model, with_text(tokens), attention_mask=torch.ones(2, 13))[:, 4:]
    need_interface(method, "bert" if "Bert" in architecture or architecture == "Roberta" else "llama")
    METHODS[method](model, tokens=4, text=TEXT)
    actual = output(model, tokens, attention_mask=mask)
    if architecture in ("Gemma2", "Mistral") and method == "prefix":
        # A sliding window forgets a text in front; a prefix stays in sight, as PEFT's does.
        assert_near(actual[:, :2], full[:, :2], 1e-4)
        assert not torch.allclose(actual, full, atol=1e-3)
    else:
        assert_near(actual, full, 1e-4)
    assert virtual_tokens(model).positions.causal  # type: ignore[union-attr]


@each_method
@each_kind
def test_starts_from_the_models_own_values_and_is_reproducible(method: str, kind: str) -> None:
    need_interface(method, kind)
    outputs = []
    for _ in range(2):
        model = build(kind)
        torch.manual_seed(7)
        METHODS[method](model, tokens=3)
        outputs.append(output(model, ids()))
    assert torch.equal(*outputs)
    for init in ("random", "vocabulary"):
        METHODS[method](model, tokens=3, init=init, name=init)
        assert not torch.equal(output(model, ids()), outputs[0])


@given(lengths=st.lists(st.integers(0, 4), min_size=2, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_positions_of_a_prompt(lengths: list[int], seed: int) -> None:
    # Row by row: a prompt of n tokens has n positions from 0 on, and the text goes on from there.
    positions = Positions("count", 0, True)
    text = torch.zeros(len(lengths), 3, dtype=torch.int64)
    shifted = positions.shifted({}, text, 0, lengths)
    whole = positions.with_prompt(shifted, [0] * len(lengths), lengths)
    assert whole is not None
    longest = max(lengths)
    for row, n in zip(whole.expand(len(lengths), -1).tolist(), lengths, strict=True):
        assert row[longest - n :] == list(range(n + 3))


# ---- gradients -------------------------------------------------------------------------------------------------------


def concatenating_attention(model: Any, own: list[torch.Tensor]) -> Any:
    """Patches a fp32 model's layers to an attention written out here, with keys and values of `own` [2, H, P, D] in
    front; returns (ids) -> output. Nothing of nybble or transformers' attention is in it."""
    layers = model.model.layers if hasattr(model, "lm_head") else model.encoder.layer
    causal = hasattr(model, "lm_head")
    sites = [layer.self_attn if causal else layer.attention.self for layer in layers]

    def forward(site: Any, number: int) -> Callable[..., Any]:
        def attend(hidden_states: torch.Tensor, position_embeddings: Any = None, **_: Any) -> Any:
            batch, length, _ = hidden_states.shape
            names = ("q_proj", "k_proj", "v_proj") if causal else ("query", "key", "value")
            q, k, v = (getattr(site, name)(hidden_states).view(batch, length, -1, 16).transpose(1, 2) for name in names)
            if causal:
                # q and k rotated by 4 more than without the prefix
                frequency = 10000.0 ** -(torch.arange(8) / 8)
                angle = (torch.arange(length) + own[number].shape[2])[:, None] * frequency
                cos, sin = torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()
                q, k = (x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin for x in (q, k))
            front = own[number][:, None].expand(-1, batch, -1, -1, -1)
            k, v = torch.cat([front[0], k], 2), torch.cat([front[1], v], 2)
            groups = q.shape[1] // k.shape[1]
            scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) / 4
            if causal:
                hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
                scores[..., own[number].shape[2] :].masked_fill_(hidden, -torch.inf)
            y = (scores.softmax(-1) @ v.repeat_interleave(groups, 1)).transpose(1, 2).reshape(batch, length, -1)
            return (site.o_proj(y) if causal else y), None

        return attend

    for number, site in enumerate(sites):
        site.forward = forward(site, number)
    if causal:
        return lambda tokens: output(model, tokens)
    shift = own[0].shape[2]
    return lambda tokens: output(model, tokens, position_ids=torch.arange(shift, shift + tokens.shape[1])[None])


@pytest.mark.parametrize("projection", [False, True])
@each_kind
def test_gradient_of_a_prefix_is_that_of_attention_written_out(kind: str, projection: bool) -> None:
    need_interface("prefix", kind)
    plain = build(kind).requires_grad_(False)
    model = copy.deepcopy(plain)
    add_prefix(model, tokens=4, projection=projection, projection_size=7 if projection else None)
    prefix: Any = virtual_tokens(model).adapters["default"]  # type: ignore[union-attr]
    if projection:
        p = {name: q.detach().clone().requires_grad_() for name, q in prefix.named_parameters()}
        hidden = torch.tanh(p["embeddings"] @ p["in_weight"].T + p["in_bias"])
        both = [hidden @ p[f"out_weights.{i}"].T + p[f"out_biases.{i}"] for i in range(2)]
        own = [x.view(4, 2, -1, 16).permute(1, 2, 0, 3) for x in both]
    else:
        p = {name: q.detach().clone().requires_grad_() for name, q in prefix.named_parameters()}
        own = [p["values.0"], p["values.1"]]
    reference = concatenating_attention(plain, own)
    actual, expected = output(model, ids()), reference(ids())
    assert_near(actual, expected, 1e-5)
    actual.sin().sum().backward()
    expected.sin().sum().backward()
    for name, parameter in prefix.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
        assert_near(parameter.grad, p[name].grad, 1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("base", BASES)
@each_kind
def test_gradient_of_a_prompt_is_that_of_embeddings_in_front(kind: str, base: str) -> None:
    plain = build(kind, base).requires_grad_(False)
    model = copy.deepcopy(plain)
    add_prompt(model, tokens=4)
    prompt: Any = virtual_tokens(model).adapters["default"]  # type: ignore[union-attr]
    own = prompt.embeddings.detach().clone().requires_grad_()
    embedded = torch.cat([own.expand(2, -1, -1), plain.get_input_embeddings()(ids())], 1)
    result = plain(inputs_embeds=embedded)
    expected = (result.logits if kind == "llama" else result.last_hidden_state)[:, 4:]
    actual = output(model, ids())
    assert_near(actual, expected)
    actual.sin().sum().backward()
    expected.sin().sum().backward()
    assert_near(prompt.embeddings.grad, own.grad, 1e-4)


@pytest.mark.parametrize("base", BASES)
@each_method
@each_kind
def test_checkpointing_gives_the_same_gradients(kind: str, method: str, base: str) -> None:
    model = adapted(method, kind, base).train()
    expected_output = output(model, ids())
    expected_output.sin().sum().backward()
    expected = gradients(model, "default")
    checkpointing(model)
    actual = output(model, ids())
    assert torch.equal(actual, expected_output)
    actual.sin().sum().backward()
    for path, grad in gradients(model, "default").items():
        assert torch.equal(grad, expected[path]) and grad.abs().max() > 0, path


def test_recomputing_with_another_prefix_is_refused() -> None:
    model = adapted("prefix").train()
    add_prefix(model, tokens=2, name="other")
    set_adapter(model, "default")
    checkpointing(model)
    loss = output(model, ids()).sum()
    set_adapter(model, "other")
    with pytest.raises(RuntimeError, match="adapters were changed between forward"):
        loss.backward()


def test_reentrant_checkpointing_is_refused() -> None:
    model = adapted("prefix").train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="reentrant activation checkpointing gives a prefix no gradient"):
        output(model, ids())


@each_method
def test_autocast_and_bf16(method: str) -> None:
    model = adapted(method)
    expected = output(model, ids())
    with torch.autocast("cpu", torch.bfloat16):
        actual = output(model, ids())
        actual.float().sin().sum().backward()
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    assert all(grad.dtype == torch.float32 for grad in gradients(model, "default").values())
    model = build("llama", dtype=torch.bfloat16)
    METHODS[method](model, tokens=4)
    assert output(model, ids()).dtype == torch.bfloat16
    output(model, ids()).float().sum().backward()


@pytest.mark.filterwarnings("ignore")
@each_method
def test_compiles_in_one_graph(method: str) -> None:
    model = adapted(method)
    expected = output(model, ids())
    expected.sin().sum().backward()
    expected_gradients = gradients(model, "default")
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    actual = compiled(input_ids=ids(), use_cache=False).logits
    assert_near(actual, expected)
    actual.sin().sum().backward()
    for path, grad in gradients(model, "default").items():
        assert_near(grad, expected_gradients[path], 1e-4)


# ---- masks, caches, packing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@each_method
@each_kind
def test_padding_changes_nothing(kind: str, method: str, implementation: str) -> None:
    model = adapted(method, kind, attn_implementation=implementation)
    tokens = ids(1, 6)
    expected = output(model, tokens)
    right = torch.cat([tokens, torch.zeros(1, 3, dtype=torch.int64)], 1)
    mask = (torch.arange(9) < 6).long()[None]
    assert_near(output(model, right, attention_mask=mask)[:, :6], expected)
    left, mask = right.roll(3, 1), mask.roll(3, 1)
    positions = (torch.arange(9) - 3).clamp(min=0)[None]
    assert_near(output(model, left, attention_mask=mask, position_ids=positions)[:, 3:], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padded", [False, True])
@each_method
def test_generation_with_a_cache_is_that_without(method: str, padded: bool, implementation: str) -> None:
    model = adapted(method, attn_implementation=implementation)
    tokens, mask = ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    if padded:
        mask[0, :2] = 0
        tokens[0, :2] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(input_ids=tokens, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(model.generate(input_ids=tokens, attention_mask=mask, use_cache=False, **options), cached)
    for row in range(2):  # alone, without padding
        alone = tokens[row : row + 1, int((1 - mask[row]).sum()) :]
        for _ in range(8):
            alone = torch.cat([alone, output(model, alone)[:, -1:].argmax(-1)], 1)
        assert torch.equal(alone[0, -8:], cached[row, 6:])
    beams = model.generate(input_ids=tokens, attention_mask=mask, num_beams=3, **options)
    assert torch.equal(
        beams, model.generate(input_ids=tokens, attention_mask=mask, num_beams=3, use_cache=False, **options)
    )


@pytest.mark.parametrize("masked", [False, True])
@each_method
def test_a_text_in_pieces_with_a_cache(method: str, masked: bool) -> None:
    # Without position_ids, which `generate` always gives.
    model = adapted(method)
    METHODS[method](model, tokens=2, name="short")
    tokens = ids(3)
    for which in ("default", ["short", None, "default"]):
        set_adapter(model, which)
        expected = output(model, tokens)
        first = model(input_ids=tokens[:, :5], use_cache=True)
        parts, cache = [first.logits], first.past_key_values
        for begin, end in ((5, 8), (8, 9)):
            inputs = {"attention_mask": torch.ones(3, end, dtype=torch.int64)} if masked else {}
            parts.append(model(input_ids=tokens[:, begin:end], past_key_values=cache, use_cache=True, **inputs).logits)
        assert_near(torch.cat(parts, 1), expected)


@each_method
def test_positions_that_restart_are_documents_only_without_a_cache(method: str) -> None:
    # That is transformers' rule: with a cache, restarting positions mean nothing else.
    model = build("llama")
    _, positions = packed((4, 5))
    text = torch.arange(4)[None]
    whole = output(model, with_text(ids()), position_ids=torch.cat([text, positions + 4], 1), use_cache=True)
    METHODS[method](model, tokens=4, text=TEXT)
    assert_near(output(model, ids(), position_ids=positions, use_cache=True), whole[:, 4:], 1e-5)
    assert not torch.allclose(output(model, ids(), position_ids=positions, use_cache=False), whole[:, 4:], atol=1e-3)


def test_a_cache_of_fixed_size_holds_a_prefix_and_not_a_prompt() -> None:
    options = {
        "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "disable_compile": True,
        "attention_mask": torch.ones(2, 9, dtype=torch.int64),
    }  # fmt: skip
    model = adapted("prefix")
    growing = model.generate(input_ids=ids(), **options)
    assert torch.equal(model.generate(input_ids=ids(), cache_implementation="static", **options), growing)
    with pytest.raises(ValueError, match="a prompt needs a cache that grows"):
        adapted("prompt").generate(input_ids=ids(), cache_implementation="static", **options)


def packed(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask [1, 1, T, T], True: may see; position_ids [1, T]) of documents in one row."""
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    mask = (document[:, None] == document).tril()
    return mask[None, None], torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", ["bool", "additive", "positions only"])
@each_method
def test_documents_of_a_packed_row_are_as_if_alone(method: str, form: str, implementation: str) -> None:
    model = adapted(method, attn_implementation=implementation).train()
    lengths = (3, 5, 1)
    tokens = ids(1, sum(lengths))
    mask, positions = packed(lengths)
    inputs: dict[str, Any] = {"position_ids": positions, "use_cache": False}
    if form == "bool":
        inputs["attention_mask"] = mask
    elif form == "additive":
        inputs["attention_mask"] = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    together = output(model, tokens, **inputs)
    together.sin().sum().backward()
    packed_gradients = gradients(model, "default")
    parts = [output(model, part) for part in tokens.split(lengths, 1)]
    assert_near(together, torch.cat(parts, 1))
    torch.cat(parts, 1).sin().sum().backward()
    for path, grad in gradients(model, "default").items():
        assert_near(packed_gradients[path], grad, 1e-4)


def test_a_prompt_of_an_encoder_refuses_masks_of_pairs() -> None:
    model = adapted("prompt", "bert")
    with pytest.raises(ValueError, match="which a bidirectional model lets see the text, it must"):
        output(model, ids(), attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attention_mask has 3 dimensions; with a prompt it must be \[B, T\]"):
        output(model, ids(), attention_mask=torch.ones(2, 9, 9))
    prefix = adapted("prefix", "bert")
    expected = output(prefix, ids())
    assert_near(output(prefix, ids(), attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool)), expected)


@each_method
def test_learned_positions_have_an_end(method: str) -> None:
    model = adapted(method, "bert")
    assert output(model, ids(1, 124)).shape == (1, 124, 64)
    with pytest.raises(ValueError, match="reaches position 128; the model has learned 128"):
        output(model, ids(1, 125))


def test_outputs_of_a_prompt_are_as_long_as_the_text() -> None:
    model = bert(pooler=True, attn_implementation="eager")
    add_prompt(model, tokens=4)
    randomize(model, "default")
    result = model(ids(), token_type_ids=torch.ones_like(ids()), output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in result.hidden_states] == [(2, 9, 64)] * 3
    assert [weights.shape for weights in result.attentions] == [(2, 4, 9, 13)] * 2
    assert torch.equal(result.pooler_output, model.pooler(result.last_hidden_state))
    pair = model(ids(), token_type_ids=torch.ones_like(ids()), return_dict=False)
    assert torch.equal(pair[0], result.last_hidden_state) and torch.equal(pair[1], result.pooler_output)
    causal = adapted("prompt")
    assert torch.isfinite(causal(ids(), labels=ids()).loss)
    embedded = causal.get_input_embeddings()(ids())
    assert torch.equal(causal(inputs_embeds=embedded).logits, output(causal, ids()))


# ---- rows, other adapters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("checkpointed", [False, True])
@each_kind
def test_rows_of_a_batch_with_their_own(kind: str, checkpointed: bool, implementation: str) -> None:
    need_interface("prefix", kind)
    model = build(kind, attn_implementation=implementation)
    which = ["p2", "q3", None, "lora", "p5", "q1", "neck", "p2"]
    for name, add in (("p2", add_prefix), ("p5", add_prefix), ("q3", add_prompt), ("q1", add_prompt)):
        add(model, tokens=int(name[1]), name=name)
    add_lora(model, r=2, name="lora")
    add_bottleneck(model, size=4, name="neck")
    names = {name for name in which if name is not None}
    for number, name in enumerate(sorted(names)):
        randomize(model, name, seed=number)
    assert {info.name: info.kinds[0] for info in adapters(model)} == {
        "lora": "lora", "neck": "bottleneck", "p2": "prefix", "p5": "prefix", "q1": "prompt", "q3": "prompt"
    }  # fmt: skip
    tokens = ids(8, 7)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    mask[4, 6:] = 0
    model.train()
    if checkpointed:
        checkpointing(model)
    set_adapter(model, which)
    mixed = output(model, tokens, attention_mask=mask)
    seen = mask.bool()
    (mixed[seen]).sin().sum().backward()
    together = {name: gradients(model, name) for name in names}
    if kind == "llama":
        assert_near(output(model, tokens[:, :4]), mixed[:, :4])  # without a mask
    for name in [*sorted(names), None]:
        rows = [i for i, row in enumerate(which) if row == name]
        with use_adapter(model, name):
            alone = output(model, tokens[rows], attention_mask=mask[rows])
            assert_near(mixed[rows][seen[rows]], alone[seen[rows]])
            if name is None:
                continue
            alone[seen[rows]].sin().sum().backward()
            for path, grad in gradients(model, name).items():
                assert_near(together[name][path], grad, 2e-4)
    set_adapter(model, which)
    with pytest.raises(ValueError, match="adapters were chosen for 8 rows"):
        output(model, tokens[:3])


def test_rows_generate_and_pack_with_their_own() -> None:
    model = build("llama")
    for name, add, count in (("p", add_prefix, 3), ("q", add_prompt, 3), ("r", add_prompt, 2)):
        add(model, tokens=count, name=name)
        randomize(model, name)
    which = ["q", None, "p", "r"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens, mask = ids(4, 6), torch.ones(4, 6, dtype=torch.int64)
    set_adapter(model, which)
    mixed = model.generate(input_ids=tokens, attention_mask=mask, **options)
    pairs, positions = packed((2, 4))
    inputs = {"attention_mask": pairs, "position_ids": positions}
    rows = output(model, tokens, **{key: value.expand(4, *value.shape[1:]) for key, value in inputs.items()})
    without = output(model, tokens, position_ids=positions, use_cache=False)
    for row, name in enumerate(which):
        with use_adapter(model, name):
            one = slice(row, row + 1)
            assert torch.equal(
                model.generate(input_ids=tokens[one], attention_mask=mask[one], **options)[0], mixed[row]
            )
            assert_near(output(model, tokens[one], **inputs), rows[one])
            assert_near(rows[one], without[one])


def test_swap_is_exact() -> None:
    model = build("llama", "nf4")
    before = output(model, ids())
    expected = {}
    for name, add in (("a", add_prefix), ("b", add_prompt), ("c", add_prefix), ("d", add_lora)):
        add(model, name=name)
        randomize(model, name)
        expected[name] = output(model, ids())
    for name in "cabd":
        set_adapter(model, name)
        assert torch.equal(output(model, ids()), expected[name])
    set_adapter(model, None)
    assert torch.equal(output(model, ids()), before)
    delete_adapter(model, "a")
    delete_adapter(model, "b")
    set_adapter(model, "c")
    assert torch.equal(output(model, ids()), expected["c"])


# ---- on the model and off it -----------------------------------------------------------------------------------------


def state(model: Any) -> list[Any]:
    """Everything of a model that virtual tokens could change."""
    return [
        [
            (name, len(m._forward_pre_hooks), len(m._forward_hooks), sorted(m.__dict__))
            for name, m in model.named_modules()
        ],
        sorted(model.state_dict()),
        model.config._attn_implementation,
    ]


@each_method
@each_kind
def test_deleting_leaves_the_model_as_it_was(kind: str, method: str) -> None:
    need_interface(method, kind)
    model = build(kind)
    before, expected = state(model), output(model, ids())
    METHODS[method](model, tokens=3)
    METHODS[method](model, tokens=5, name="b")
    assert state(model) != before
    delete_adapter(model, "default")
    delete_adapter(model, "b")
    assert state(model) == before
    assert not any(isinstance(module, Adapted) for module in model.modules())
    assert torch.equal(output(model, ids()), expected)


@each_method
def test_copies_and_pickles_are_independent(method: str) -> None:
    model = adapted(method)
    add_lora(model, r=2, name="lora")
    set_adapter(model, "default")
    expected = output(model, ids())
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in others:
        assert torch.equal(output(other, ids()), expected)
        virtual, own = virtual_tokens(other), virtual_tokens(model)
        assert virtual is not own
        with torch.no_grad():
            next(virtual.parameters()).zero_()  # type: ignore[union-attr]
        assert not torch.equal(output(other, ids()), expected)
        delete_adapter(other, "default")
        assert other.config._attn_implementation == "sdpa"
        assert torch.equal(output(model, ids()), expected)
    delete_adapter(model, "default")
    assert model.config._attn_implementation == "sdpa"


def test_two_models_of_one_configuration() -> None:
    config = llama().config
    torch.manual_seed(0)
    one, two = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    assert one.config is two.config
    plain = output(two, ids())
    add_prefix(one, tokens=3)
    first = output(one, ids())
    assert torch.equal(output(two, ids()), plain)
    add_prefix(two, tokens=3)
    second = output(two, ids())
    delete_adapter(one, "default")
    assert torch.equal(output(two, ids()), second)  # still there
    assert not torch.equal(output(one, ids()), first)


def test_a_prefix_survives_a_change_of_the_attention() -> None:
    model = adapted("prefix")
    expected = output(model, ids())
    model.set_attn_implementation("eager")
    assert_near(output(model, ids()), expected)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(RuntimeError, match="attention was set to 'flex_attention' after a prefix was added"):
        output(model, ids())
    model.config._attn_implementation = "sdpa"
    delete_adapter(model, "default")
    assert model.config._attn_implementation == "sdpa"


def test_inside_another_module_and_by_the_decoder() -> None:
    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = build("llama").model
            self.head = torch.nn.Linear(64, 2)

    model = Classifier()
    add_prefix(model, tokens=2)
    assert virtual_tokens(model) is model.encoder.nybble_virtual
    causal = adapted("prompt")
    hidden = causal.model(input_ids=ids(), use_cache=False).last_hidden_state
    assert torch.equal(causal.lm_head(hidden), output(causal, ids()))


def test_saved_by_transformers_without_a_trace_in_the_configuration(tmp_path: Any) -> None:
    model = adapted("prefix")
    model.config.save_pretrained(tmp_path)
    assert "nybble" not in (tmp_path / "config.json").read_text()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("Falcon", {"bos_token_id": 0, "eos_token_id": 0}, "Falcon.* has 2 layers, and 0 of them compute attention"),
        ("Bloom", {}, "Bloom.* has 2 layers, and 0 of them compute attention"),
        ("T5", {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 32}, "T5.* is an encoder-decoder"),
        (
            "Albert",
            {"embedding_size": 16, "intermediate_size": 32},
            "Albert.*(uses an attention layer several times|0 of them)",
        ),
        ("Mamba", {"state_size": 4}, "Mamba"),
    ],
)
def test_models_whose_attention_cannot_be_reached(architecture: str, settings: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    config = getattr(transformers, f"{architecture}Config")(**({} if architecture == "T5" else common), **settings)
    model = transformers.AutoModel.from_config(config).eval()
    before = state(model)
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        add_prefix(model, tokens=2)
    assert state(model) == before and [p.requires_grad for p in model.parameters()] == trains


def test_a_prompt_goes_where_a_prefix_cannot() -> None:
    torch.manual_seed(0)
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=256, initializer_range=0.2)
    model = transformers.BloomModel(config).eval()
    full = output(model, with_text(ids()))[:, 4:]
    add_prompt(model, text=TEXT, tokens=4)
    assert_near(output(model, ids()), full, 1e-5)
    add_prompt(model, tokens=2, name="short")
    set_adapter(model, ["short", "default"])
    with pytest.raises(ValueError, match="rows with different numbers of virtual tokens need a model that takes pos"):
        output(model, ids())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("prefix", {"tokens": 0}, "tokens is 0; it must be an integer of 1 or more"),
        ("prompt", {"tokens": 1.5}, "tokens is 1.5; it must be"),
        ("prefix", {"init": "zero"}, "init is 'zero'; allowed are vocabulary, random, text"),
        ("prompt", {"init": "text"}, "text is missing, and init is 'text'"),
        ("prefix", {"init": "random", "text": [1]}, "text is given, and init is 'random'"),
        ("prefix", {"projection": True, "init": "vocabulary"}, "init is 'vocabulary'; with projection it must be"),
        ("prefix", {"projection_size": 4}, "projection_size is given, and projection is False"),
        ("prefix", {"projection": True, "projection_size": 0}, "projection_size is 0; it must be"),
        ("prompt", {"std": 0}, "std is 0; it must be a finite number above 0"),
        ("prompt", {"dtype": torch.int8}, "dtype is torch.int8; allowed are"),
        ("prompt", {"text": []}, "text has 0 tokens; it must have 1 or more, with ids below 256"),
        ("prefix", {"text": [3, 256]}, "text has 2 tokens; it must have 1 or more, with ids below 256"),
        ("prefix", {"name": "a b"}, "adapter name is 'a b'"),
    ],
)
def test_bad_settings_are_named(method: str, options: dict[str, Any], message: str) -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        METHODS[method](model, **options)
    assert state(model) == before


def test_other_refusals() -> None:
    model = adapted("prefix")
    for add in METHODS.values():
        with pytest.raises(ValueError, match="model has a prefix 'default' already"):
            add(model)
    with pytest.raises(TypeError, match="text is a string, and no tokenizer is given"):
        add_prompt(model, text="a text", name="b")
    with pytest.raises(TypeError, match="holds 0 transformers models"):
        add_prompt(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="give either config or its fields"):
        add_prompt(model, nybble.PromptConfig(), tokens=3)
    flex = build("llama")
    flex.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="its attention is 'flex_attention'; a prefix needs one of 'sdpa', 'eager'"):
        add_prefix(flex)
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        model(attention_mask=torch.ones(1, 3))


def test_a_text_by_a_tokenizer() -> None:
    class Bytes:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return list(text.encode())

    ours, theirs = build("llama"), build("llama")
    add_prompt(ours, text="ab", tokenizer=Bytes(), tokens=5)
    add_prompt(theirs, text=[97, 98, 97, 98, 97], tokens=5)
    assert torch.equal(output(ours, ids()), output(theirs, ids()))
