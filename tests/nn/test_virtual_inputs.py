"""Prefixes and prompts with padding, caches, packed documents, and in batches whose rows have their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import assert_near, bert, build, checkpointing, gradients, ids, output, randomize
from virtual_models import (
    IMPLEMENTATIONS,
    METHODS,
    TEXT,
    adapted,
    each_kind,
    each_method,
    need_interface,
    packed,
    with_text,
)

from nybble.nn import add_bottleneck, add_lora, add_prefix, add_prompt
from nybble.nn.adapters import adapters, delete_adapter, set_adapter, use_adapter

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
