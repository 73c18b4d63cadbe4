"""Greedy generation is the argmax of whole forwards without a cache, for every architecture, row and adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decoders import ARCHITECTURES, decoder, greedy
from tiny import ByteTokenizer, llama
from tiny_models import randomize

import nybble
from nybble.nn.adapters import share_selection

PROMPTS = ["a nybble", "x", "every document ends where", "two of them"]
COUNT = 12


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def expected(model: Any, prompts: list[str] = PROMPTS, adapters: list[str | None] | None = None) -> list[list[int]]:
    result = []
    for number, prompt in enumerate(prompts):
        if adapters is None:
            result.append(greedy(model, prompt.encode(), COUNT))
        else:
            with nybble.use_adapter(model, adapters[number]):
                result.append(greedy(model, prompt.encode(), COUNT))
    return result


def tokens(model: Any, prompts: Any = PROMPTS, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": COUNT, **options}
    return [answer.tokens for answer in nybble.generate(model, ByteTokenizer(), prompts, **options)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_of_different_lengths_is_each_row_computed_whole(name: str) -> None:
    model = decoder(name)
    wanted = expected(model)
    assert len({tuple(row) for row in wanted}) > 1
    assert tokens(model) == wanted
    assert [tokens(model, [prompt])[0] for prompt in PROMPTS] == wanted


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "gemma3-window", "gpt2", "bloom"])
@pytest.mark.parametrize("at_once", [1, 5, 11])
def test_reading_prompts_in_pieces_changes_nothing(name: str, at_once: int) -> None:
    model = decoder(name)
    assert tokens(model, prefill_tokens=at_once) == expected(model)


def add(model: Any, kind: str, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    if kind in ("lora", "dora"):
        nybble.add_lora(model, r=4, alpha=16, dora=kind == "dora", name=name)
    elif kind == "bottleneck":
        nybble.add_bottleneck(model, size=8, name=name)
    elif kind == "prefix":
        nybble.add_prefix(model, tokens=3 + seed, name=name)
    else:
        nybble.add_prompt(model, tokens=2 + seed, name=name)
    randomize(model, name, 0.3, seed)


KINDS = ["lora", "dora", "bottleneck", "prefix", "prompt"]


@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_acts_in_every_step(kind: str, base: str) -> None:
    model = llama()
    if base == "nf4":
        nybble.quantize_(model)
    before = expected(model)
    add(model, kind, "one", 1)
    wanted = expected(model)
    assert wanted != before
    assert tokens(model) == wanted
    assert tokens(model, adapters=None) == before
    assert tokens(model, prefill_tokens=7) == wanted


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "gpt2"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_work_with_a_cache(kind: str, name: str) -> None:
    model = decoder(name)
    add(model, kind, "one", 1)
    assert tokens(model) == expected(model)
    assert tokens(model, prefill_tokens=7) == expected(model)


@pytest.mark.parametrize("kinds", [KINDS, ["prefix", "prefix", "prompt", "prompt"], ["lora", "lora"]])
def test_a_mix_of_adapters_in_one_batch_is_each_alone(kinds: list[str]) -> None:
    model = llama()
    for number, kind in enumerate(kinds):
        add(model, kind, f"a{number}", number)
    prompts = [PROMPTS[i % 4] for i in range(len(kinds) + 1)]
    names: list[str | None] = [None, *(f"a{i}" for i in range(len(kinds)))]
    wanted = expected(model, prompts, names)
    assert len({tuple(row) for row in wanted}) > 2
    nybble.set_adapter(model, "a0")
    assert tokens(model, prompts, adapters=names) == wanted
    assert tokens(model, prompts, adapters=names, prefill_tokens=9) == wanted
    assert share_selection(model).which == "a0"


@pytest.mark.parametrize("kernels", [True, False])
def test_rows_that_have_ended_leave_and_the_others_go_on(kernels: bool) -> None:
    model = llama()
    wanted = expected(model)
    ends = wanted[2][3]  # some row's fourth token ends an answer now
    cut = [row[: row.index(ends) + 1] if ends in row else row for row in wanted]
    assert len({len(row) for row in cut}) > 1
    answers = nybble.generate(model, ByteTokenizer(), PROMPTS, max_new_tokens=COUNT, eos=[ends], kernels=kernels)
    assert [a.tokens for a in answers] == cut
    assert [a.reason for a in answers] == ["eos" if row[-1] == ends else "length" for row in cut]


def test_ends_are_those_of_the_generation_config_and_the_tokenizer() -> None:
    model = llama()
    wanted = expected(model)[0]
    model.generation_config.eos_token_id = [wanted[4], 0]
    answer = nybble.generate(model, ByteTokenizer(), PROMPTS[0], max_new_tokens=COUNT)[0]
    assert answer.reason == "eos" and answer.tokens == wanted[: wanted.index(wanted[4]) + 1]


def test_the_model_is_as_it_was_before_also_between_pieces() -> None:
    model = llama().train()
    add(model, "lora", "one", 1)
    add(model, "lora", "two", 2)
    nybble.set_adapter(model, "one")
    state = torch.random.get_rng_state()
    pieces = nybble.generation.stream(
        model, ByteTokenizer(), PROMPTS, adapters=["two", None, "one", "two"], max_new_tokens=COUNT, temperature=1.0
    )
    for _ in pieces:
        assert model.training and all(m.training for m in model.modules())
        assert share_selection(model).which == "one" and not torch.is_inference_mode_enabled()
    for _ in nybble.generation.stream(model, ByteTokenizer(), PROMPTS, adapters=None, max_new_tokens=COUNT):
        break
    assert model.training and share_selection(model).which == "one" and not torch.is_inference_mode_enabled()
    assert torch.equal(state, torch.random.get_rng_state())


def test_errors_name_what_is_wrong() -> None:
    model, tokenizer = llama(), ByteTokenizer()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        nybble.generate(model, tokenizer, ["a", ""])
    with pytest.raises(ValueError, match="prompts is empty"):
        nybble.generate(model, tokenizer, [])
    with pytest.raises(ValueError, match="prompt 1 has 128 tokens; the model's context of 128"):
        nybble.generate(model, tokenizer, ["a", "b" * 128])
    with pytest.raises(ValueError, match="prompt 0 has token ids up to 300; the model knows 256"):
        nybble.generate(model, tokenizer, [[1, 300]])
    with pytest.raises(ValueError, match="no adapter 'x'; it has none"):
        nybble.generate(model, tokenizer, "a", adapters="x")
    with pytest.raises(ValueError, match="adapters has 2 names for 1 prompts"):
        nybble.generate(model, tokenizer, ["a"], adapters=[None, None])
    with pytest.raises(TypeError, match="config or its fields"):
        nybble.generate(model, tokenizer, "a", nybble.GenerationConfig(), top_k=2)
    with pytest.raises(ValueError, match="BertModel"):
        from tiny_models import bert

        nybble.generate(bert(), tokenizer, "a")
    add(model, "prefix", "p", 2)
    with pytest.raises(ValueError, match="prompt 0 has 125 tokens behind 5 virtual tokens"):
        nybble.generate(model, tokenizer, "b" * 125)


def test_an_answer_ends_where_the_context_does() -> None:
    model = llama()
    answer = nybble.generate(model, ByteTokenizer(), "b" * 120, max_new_tokens=50, eos=())[0]
    assert len(answer.tokens) == 8 and answer.reason == "context"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
        ("top_p", 1.1), ("min_p", -0.1), ("repetition_penalty", 0.0), ("stop", [""]), ("seed", 0.5),
        ("prefill_tokens", 0),
    ],
)  # fmt: skip
def test_settings_that_are_not_allowed(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        nybble.GenerationConfig(**{field: value})
