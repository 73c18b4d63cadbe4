"""The bodies of tests/gpu that need no GPU, run by the kernels in the shim: sums of integers, which are exact."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from gpu.on_gpu import EXAMPLES, forced, integer_problems, run_exactly
from hypothesis import given, settings
from kernels import exact


@pytest.mark.parametrize("kernel", ["linear_small_m", "linear_wgmma", "linear_mma", "linear_fp32"])
@settings(max_examples=EXAMPLES // 5)
@given(arguments=integer_problems(140, 200, 70))
def test_sums_of_integers_are_exact(on_shim: ModuleType, capability: int, kernel: str, arguments: dict) -> None:
    with forced(kernel):
        run_exactly(exact.make(**arguments))


@pytest.mark.parametrize("m, grad", [(1, False), (16, False), (33, False), (20, True)])
def test_sums_over_many_tiles_are_exact(on_shim: ModuleType, m: int, grad: bool) -> None:
    run_exactly(exact.make(*((520, 192) if grad else (192, 1088)), m, rank=16, bias=True, grad=grad))


def test_a_wrong_scale_would_be_seen(on_shim: ModuleType) -> None:
    problem = exact.make(64, 128, 3)
    right = exact.answer(problem)
    problem.weight.absmax[5] ^= 8
    assert not torch.equal(right, exact.answer(problem))
