"""What only `linear_fp32` promises: nothing of an fp32 input is lost. All else is tested in test_mma.py."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from kernels.gpu_problems import explained, run
from kernels.problems import assert_within_bound, make, values


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
def test_an_fp32_input_is_multiplied_in_fp32(cuda: ModuleType, grad: bool) -> None:
    # bitsandbytes computes it in bf16, tensor cores in tf32: both lose these low bits, 1 + 2^-20 rounds to 1.
    for m in (1, 17):
        for n, k in ((48, 48), (64, 64)):
            problem = make(n, k, m, grad=grad)
            contraction = n if grad else k
            signs = values("normal", m, contraction, dtype=torch.float32, seed=3).sign()
            problem.x = torch.full((m, contraction), 1.0) + 2.0**-20 * signs
            assert_within_bound(problem, run(cuda, problem, "linear_fp32"))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_row_selects_a_column_of_the_weight_exactly(cuda: ModuleType, format: str) -> None:
    # With a unit vector for x there is nothing to round: what comes is the weight as it is dequantized.
    problem = make(9, 96, 1, format, 32)
    weight = cuda.dequantize(problem.packed, torch.float32)
    if format == "int8":  # whose quotient the kernels for products round once more
        weight = problem.weight.packed.float() * (problem.weight.absmax / 127.0).unsqueeze(1)
    problem.x = torch.eye(96)
    assert torch.equal(run(cuda, problem, "linear_fp32"), weight.t())
    problem.grad, problem.x = True, torch.eye(9)
    assert torch.equal(run(cuda, problem, "linear_fp32"), weight)


def test_fp32_inputs_choose_it(cuda: ModuleType) -> None:
    for m in (1, 5000):
        for grad in (False, True):
            assert explained(cuda, make(64, 64, m, grad=grad))["kernel"] == "linear_fp32"
