"""Sums of integers, of which every bit is known: what a bound for a long sum would let pass is seen here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import exact
from kernels.problems import decoded

from nybble import _core

KERNELS = ("", "linear_small_m", "linear_panel", "linear_tiles", "linear_tiles_few")


@st.composite
def arguments(draw: st.DrawFn) -> dict:
    return {
        "n": draw(st.integers(1, 100)),
        "k": draw(st.one_of(st.integers(1, 300), st.sampled_from((512, 1024, 1088)))),
        "m": draw(st.integers(1, 40)),
        "int8": draw(st.booleans()),
        "block": draw(st.sampled_from((32, 64, 128, 4096))),
        "nested": draw(st.booleans()),
        "dtype": draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))),
        "bias": draw(st.booleans()),
        "rank": draw(st.sampled_from((0, 1, 16, 33))),
        "grad": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31 - 10)),
    }


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25)
@given(arguments=arguments())
def test_sums_of_integers_are_exact(isa: str, kernel: str, arguments: dict) -> None:
    problem = exact.make(**arguments)
    previous = _core.force_kernel(kernel)
    try:
        assert torch.equal(problem.run(), exact.answer(problem))
    finally:
        _core.force_kernel(previous)


def test_the_weights_are_those_of_the_specification() -> None:
    for int8, nested in ((False, False), (False, True), (True, False)):
        weight = exact.weight(37, 67, int8=int8, block=32, nested=nested, seed=1, device=torch.device("cpu"))
        assert torch.equal(exact.rows_of(weight, 0, 37), decoded(weight).double())


def test_one_wrong_scale_is_seen() -> None:
    problem = exact.make(64, 1024, 3)
    right = exact.answer(problem)
    problem.weight.absmax[5] ^= 8
    assert not torch.equal(right, problem.run())
