"""A step on several ranks: bytes that travel, counted on a real model, and how memory falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import llama

import nybble
from nybble.planning import BUILT_IN, Cluster, Work, estimate, plan, scaled_rows, scaled_step, shape_of
from nybble.planning.scaling import traffic
from nybble.training.methods import Method, apply

SHAPE = BUILT_IN["Llama-3.1-70B"]


def nbytes(module: Any) -> int:
    return sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_bytes_that_travel_are_those_of_the_models_parameters(method: str) -> None:
    """Every layer's parameters twice, the rest once; fp32 gradients."""
    model = llama(torch.float32 if method == "full" else torch.bfloat16, tie_word_embeddings=False)
    shape = shape_of(model)
    if method == "lora":
        nybble.quantize_(model)
    apply(model, Method(method))
    layers = sum(map(nbytes, model.model.layers))
    embedding = nbytes(model.model.embed_tokens)
    outer = nbytes(model.lm_head) + nbytes(model.model.norm)
    gathered, reduced = traffic(shape, method, "fp32" if method == "full" else "nf4", Work(), Cluster(4))
    assert gathered == 2 * layers + embedding + outer
    assert reduced == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_ddp_sends_the_trained_gradients_only() -> None:
    step = scaled_step(SHAPE, "lora", "nf4", Work(), Cluster(8, "ddp"))
    assert step.gathered == 0 and step.reduced == 4 * step.rank.trained
    assert step.received == round(2 * 7 / 8 * step.reduced)
    assert step.rank == estimate(SHAPE, "lora", "nf4", Work(), True)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(BUILT_IN)), st.sampled_from((("lora", "nf4"), ("lora", "bf16"), ("full", "fp32"))))
def test_a_ranks_memory_falls_with_the_ranks(name: str, pair: tuple[str, str]) -> None:
    sizes = [scaled_step(BUILT_IN[name], *pair, Work(), Cluster(n)).rank.total for n in (2, 4, 16, 64, 256)]
    assert sizes == sorted(sizes, reverse=True)


def test_all_parts_of_all_ranks_are_the_whole() -> None:
    alone = estimate(SHAPE, "lora", "nf4", Work(), True)
    rank = scaled_step(SHAPE, "lora", "nf4", Work(), Cluster(16)).rank
    for part in ("weights", "scales", "adapters", "optimizer"):
        assert 0 <= 16 * rank.part(part) - alone.part(part) < 16 * 3


def test_seconds_lie_between_overlap_and_none() -> None:
    step = scaled_step(SHAPE, "lora", "nf4", Work(), Cluster(16, flops=1e14, bandwidth=1e10))
    assert step.computing == step.operations / 1e14 and step.sending == step.received / 1e10
    assert step.least == max(step.computing, step.sending) < step.most == step.computing + step.sending
    assert step.tokens == 16 * 2048


def test_operations_are_those_of_the_matrices() -> None:
    """Without attention and updates: 4 a weight and token, 6 with checkpointing; the head 4."""
    work = Work(seq=1, rank=1)
    for checkpointing, each in ((False, 4), (True, 6)):
        step = scaled_step(SHAPE, "lora", "nf4", work, Cluster(1), checkpointing)
        assert step.operations == pytest.approx(each * SHAPE.linear + 4 * SHAPE.embedding, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0}, "ranks must be an integer of at least 1"),
        ({"sharding": "zero"}, "sharding must be one of fsdp, ddp"),
        ({"bandwidth": 0}, "bandwidth must be a number above 0"),
    ],
)
def test_bad_arguments_of_a_cluster_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cluster(**options)
    with pytest.raises(ValueError, match="inference"):
        scaled_step(SHAPE, "inference", "nf4", Work(), Cluster(2))


def test_every_way_that_trains_has_a_row() -> None:
    found = plan("Llama-3.1-405B", 80e9, device="cuda")
    rows = scaled_rows(found, Cluster(16))
    assert list(rows) == [row.way.key for row in found.rows if row.checkpointed is not None]
    assert rows["qlora"].rank.total < found.memory.free < rows["full"].rank.total
