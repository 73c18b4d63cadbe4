"""Steps in kernels alone: which models take them, and that they are what the model's own forward computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decoders import ARCHITECTURES, decoder, greedy
from test_greedy import COUNT, PROMPTS, add, tokens
from tiny import ByteTokenizer, llama

import nybble
from nybble import _core
from nybble.generation import lean_step
from nybble.generation.decoder import Batch, ModelTraits
from nybble.generation.loop import acting

KNOWN = {"llama", "llama-gqa", "qwen2-bias", "qwen3-norms", "gemma"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_builds_that_are_known(name: str) -> None:
    model = decoder(name)
    state = torch.random.get_rng_state()
    build = ModelTraits(model).build()
    assert torch.equal(state, torch.random.get_rng_state())
    assert (build is not None) == (name in KNOWN)
    if build is not None:
        assert (build.offset, build.activation) == ((1.0, "gelu_tanh") if name == "gemma" else (0.0, "silu"))


@pytest.mark.parametrize("name", sorted(KNOWN))
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_both_ways_write_the_same(name: str, base: str) -> None:
    model = decoder(name)
    if base == "nf4":
        nybble.quantize_(model)
    assert tokens(model, kernels=True) == tokens(model, kernels=False)


@pytest.mark.parametrize("kind", ["lora", "dora", "bottleneck", "prefix", "prompt"])
def test_both_ways_write_the_same_with_adapters(kind: str) -> None:
    model = llama()
    nybble.quantize_(model)
    add(model, kind, "one", 1)
    add(model, kind, "two", 2)
    names = ["one", None, "two", "one"]
    assert tokens(model, adapters=names, kernels=True) == tokens(model, adapters=names, kernels=False)


def logits(model: Any, texts: list[list[int]], kernels: bool, steps: int = 6) -> torch.Tensor:
    """fp32 [steps, rows, vocabulary] for given tokens."""
    traits = ModelTraits(model)
    with acting(model, [None] * len(texts)):
        batch = Batch(traits, [None] * len(texts), 64, traits.build() if kernels else None)
        batch.read([text[:-steps] for text in texts], 1024)
        return torch.stack([batch.step([text[i] for text in texts]).clone() for i in range(-steps, 0)])


def test_in_bf16_a_step_is_at_least_as_exact_as_the_models_own() -> None:
    """Against fp32 of the same bf16 weights: the mean error is no larger than the model's own forward's, plus a tenth
    of it for the luck of roundings over these 6,144 logits."""
    model = llama(num_hidden_layers=4, hidden_size=128, intermediate_size=256, seed=3)
    texts = [torch.randint(1, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (30, 22, 17, 25)]
    model.bfloat16()
    own, ours = (logits(model, texts, kernels) for kernels in (False, True))
    exact = logits(model.float(), texts, False)
    assert (ours - exact).abs().mean() <= 1.1 * (own - exact).abs().mean()


@pytest.fixture
def one_kernel() -> Iterator[None]:
    """With a matrix unit, three rows would have another kernel than one."""
    previous = _core.force_kernel("linear_small_m")
    yield
    _core.force_kernel(previous)


def test_a_rows_bits_depend_neither_on_threads_nor_on_its_neighbours(one_kernel: None, threads: Any) -> None:
    """Steps, from the same cache: what a prompt's reading rounds is torch's."""
    model = llama()
    nybble.quantize_(model)
    model.bfloat16()
    texts = [list(range(1, 20)), list(range(30, 49)), list(range(60, 79))]
    results = []
    for number in (1, 3):
        threads(number)
        results.append(logits(model, texts, True, steps=18))
    assert torch.equal(*results)
    threads(1)
    alone = logits(model, texts[1:2], True, steps=18)
    assert torch.equal(alone[:, 0], results[0][:, 1])


def test_a_model_that_somebody_listens_to_keeps_its_own_forward() -> None:
    model = llama()
    seen = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(1))
    assert ModelTraits(model).build() is None
    wanted = tokens(model)
    assert len(seen) >= COUNT
    handle.remove()
    assert ModelTraits(model).build() is not None and tokens(model) == wanted
    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *args: seen.append(2))
    assert ModelTraits(model).build() is not None  # a linear layer is called as it is
    assert tokens(model) == wanted and seen.count(2) >= COUNT
    handle.remove()


def test_a_part_of_another_class_or_autocast_keeps_the_models_own_forward() -> None:
    model = llama()
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    assert ModelTraits(model).build() is None
    assert tokens(model) == [greedy(model, prompt.encode(), COUNT) for prompt in PROMPTS]
    with torch.autocast("cpu", torch.bfloat16):
        assert ModelTraits(llama()).build() is None


def test_a_model_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another formula anywhere in a step: the small likeness of the model tells."""
    monkeypatch.setattr(lean_step, "_known", {})
    right = lean_step.decoding.attention_step

    def wrong(*args: Any) -> Any:
        *others, scale, out = args
        return right(*others, scale * 1.01, out)

    monkeypatch.setattr(lean_step.decoding, "attention_step", wrong)
    assert ModelTraits(llama()).build() is None
    assert tokens(llama()) == [greedy(llama(), prompt.encode(), COUNT) for prompt in PROMPTS]


def test_rotary_tables_follow_a_long_answer() -> None:
    """Longer than the tables that are made at once, in a context that grows them."""
    model = llama(max_position_embeddings=512)
    answer = nybble.generate(model, ByteTokenizer(), "a nybble", max_new_tokens=200, eos=())[0]
    own = nybble.generate(model, ByteTokenizer(), "a nybble", max_new_tokens=200, eos=(), kernels=False)[0]
    assert answer.tokens == own.tokens
    scaled = llama(
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )
    text = list(range(1, 61))
    for options in ({"max_new_tokens": 4},):
        both = [
            nybble.generate(scaled, ByteTokenizer(), [text], eos=(), kernels=k, **options)[0] for k in (True, False)
        ]
        assert both[0].tokens == both[1].tokens
