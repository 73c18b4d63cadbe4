"""Prefixes and prompts: what they mean, on every architecture, and their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import BASES, assert_near, build, checkpointing, gradients, ids, output
from virtual_models import (
    IMPLEMENTATIONS,
    METHODS,
    TEXT,
    adapted,
    each_kind,
    each_method,
    need_interface,
    with_text,
)

from nybble.nn import add_prefix, add_prompt
from nybble.nn.adapters import delete_adapter, set_adapter
from nybble.nn.positions import Positions
from nybble.nn.virtual import virtual_tokens

transformers = pytest.importorskip("transformers")


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
