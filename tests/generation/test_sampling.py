"""The choice of a token: against a plain reference, and as a function of (seed, prompt, step) alone."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from decoders import llama
from hypothesis import given
from hypothesis import strategies as st
from tiny import ByteTokenizer

import nybble
from nybble import GenerationConfig
from nybble.generation.sampling import candidates, choose, penalized, uniform

_logits = st.lists(st.sampled_from((-math.inf, -3.0, -1.0, 0.0, 0.5, 0.75, 1.0, 2.5, 6.0)), min_size=2, max_size=40)


def plain(logits: list[float], config: GenerationConfig) -> dict[int, float]:
    """token -> probability, one definition after another, in Python's numbers."""
    scaled = {i: v / config.temperature for i, v in enumerate(logits) if v > -math.inf}
    if config.top_k:
        least = sorted(scaled.values(), reverse=True)[: config.top_k][-1]
        scaled = {i: v for i, v in scaled.items() if v >= least}
    most = max(scaled.values())
    total = math.fsum(math.exp(v - most) for v in scaled.values())
    p = {i: math.exp(v - most) / total for i, v in scaled.items()}
    if config.top_p < 1:
        kept, mass = {}, 0.0
        for i in sorted(p, key=lambda i: (-p[i], i)):
            if kept and mass >= config.top_p:
                break
            kept[i], mass = p[i], mass + p[i]
        p = kept
    p = {i: v for i, v in p.items() if v >= config.min_p * max(p.values())}
    return {i: v / math.fsum(p.values()) for i, v in p.items()}


@given(
    logits=_logits.filter(lambda values: max(values) > -math.inf),
    temperature=st.sampled_from((0.1, 0.7, 1.0, 3.0)),
    top_k=st.integers(0, 8),
    top_p=st.sampled_from((0.05, 0.35, 0.62, 0.9, 1.0)),
    min_p=st.sampled_from((0.0, 0.013, 0.31, 1.0)),
)
def test_candidates_and_their_probabilities(logits, temperature, top_k, top_p, min_p) -> None:
    config = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = plain(logits, config)
    tokens, weights = candidates(torch.tensor(logits), config)
    actual = dict(zip(tokens.tolist(), (weights / weights.sum()).tolist(), strict=True))
    assert actual.keys() == expected.keys()
    assert all(math.isclose(actual[i], expected[i], rel_tol=1e-9) for i in expected)


def test_a_large_vocabulary_is_sorted_in_parts_with_the_same_result() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.3
    for top_p in (0.01, 0.3, 0.9, 0.999):
        config = GenerationConfig(temperature=1.0, top_p=top_p)
        tokens, _ = candidates(logits, config)
        assert set(tokens.tolist()) == plain(logits.tolist(), config).keys()


def test_top_p_that_is_reached_exactly_takes_no_more() -> None:
    for count, top_p, kept in ((2, 0.5, [0]), (4, 0.5, [0, 1]), (4, 0.75, [0, 1, 2])):
        tokens, _ = candidates(torch.zeros(count), GenerationConfig(temperature=1.0, top_p=top_p))
        assert tokens.tolist() == kept


def test_tokens_come_as_often_as_they_should() -> None:
    """10,000 draws; a count is within 5 standard deviations of its mean but for one time in two million."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    config = GenerationConfig(temperature=1.0, seed=7)
    count = 10_000
    found = Counter(choose(logits, (), config, index=3, step=step) for step in range(count))
    for token, p in enumerate(logits.softmax(0).tolist()):
        assert abs(found[token] - count * p) <= 5 * math.sqrt(count * p * (1 - p))


@given(seed=st.integers(-(2**70), 2**70), index=st.integers(0, 1000), step=st.integers(0, 10**6))
def test_uniform_numbers(seed: int, index: int, step: int) -> None:
    value = uniform(seed, index, step)
    assert 0.0 <= value < 1.0 and value == uniform(seed, index, step)
    assert len({uniform(seed, index, step + i) for i in range(4)} | {uniform(seed, index + 1, step)}) == 5


@given(logits=_logits.map(lambda values: torch.tensor(values)), seen=st.sets(st.integers(0, 1)))
def test_the_repetition_penalty(logits: torch.Tensor, seen: set[int]) -> None:
    result = penalized(logits, seen, 2.0) if seen else logits
    for i, value in enumerate(logits.tolist()):
        wanted = value if i not in seen else value / 2 if value > 0 else value * 2
        assert result[i].item() == wanted
    if logits.max() > -math.inf and seen:
        assert choose(logits, seen, GenerationConfig(repetition_penalty=2.0), 0, 0) == int(result.argmax())


def test_logits_that_are_no_numbers_are_an_error() -> None:
    for values in ([math.nan, 1.0], [-math.inf, -math.inf], [math.inf, 0.0]):
        with pytest.raises(ValueError, match="logits have"):
            choose(torch.tensor(values), (), GenerationConfig(), 0, 0)


def test_a_prompts_text_depends_on_nothing_beside_it() -> None:
    model, tokenizer = llama(), ByteTokenizer()
    prompts = ["a nybble", "x", "every document"]
    options = {"max_new_tokens": 10, "temperature": 1.0, "top_p": 0.95, "seed": 5, "eos": ()}
    together = nybble.generate(model, tokenizer, prompts, **options)
    longer = nybble.generate(model, tokenizer, [*prompts, "one more of them"], **options)
    assert [a.tokens for a in longer[:3]] == [a.tokens for a in together]
    assert nybble.generate(model, tokenizer, prompts[:1], **options)[0].tokens == together[0].tokens
    other = nybble.generate(model, tokenizer, prompts, **{**options, "seed": 6})
    assert [a.tokens for a in other] != [a.tokens for a in together]
    same = nybble.generate(model, tokenizer, ["x", "x"], **options)
    assert same[0].tokens != same[1].tokens


def test_settings_change_what_is_written() -> None:
    model, tokenizer = llama(), ByteTokenizer()
    plain_text = nybble.generate(model, tokenizer, "a nybble", max_new_tokens=12, eos=())[0].tokens
    penalty = nybble.generate(model, tokenizer, "a nybble", max_new_tokens=12, eos=(), repetition_penalty=1e9)[0].tokens
    assert len(set(plain_text)) < 12 and len(set(penalty)) == 12
    narrow = nybble.generate(model, tokenizer, "a nybble", max_new_tokens=12, eos=(), temperature=2.0, top_k=1)[0]
    assert narrow.tokens == plain_text
