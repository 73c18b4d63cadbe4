"""How far a GPU's linear kernels may be from the truth, and running one of them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from kernels.problems import TINY, UNIT, Problem, assert_within, block_unit, decoded, problems
from torch import Tensor

from nybble.backends import PackedWeight


def run(cuda: ModuleType, problem: Problem, kernel: str, packed: PackedWeight | None = None) -> Tensor:
    """The problem by `kernel`, which has to be one that can run it; `packed`: the weight's tensors, if others."""
    weight = problem.packed if packed is None else packed
    core = cuda.core()
    previous = core.force_kernel(kernel)
    try:
        assert explained(cuda, problem)["kernel"] == kernel
        if problem.grad:
            return cuda.grad_input(problem.x, weight, problem.side, problem.side_weight)
        return cuda.linear(problem.x, weight, problem.bias, problem.side, problem.side_weight)
    finally:
        core.force_kernel(previous)


def explained(cuda: ModuleType, problem: Problem) -> dict[str, str]:
    """What `explain` says of the problem."""
    rows, columns = problem.weight.shape
    int8 = problem.weight.codebook is None
    block = 64 if int8 else problem.weight.block_size
    m = problem.x.shape[:-1].numel()
    return cuda.explain_linear(rows, columns, m, problem.x.dtype, int8, problem.grad, block_size=block)


def pair_problems(dtype: torch.dtype, **options: Any) -> st.SearchStrategy[Problem]:
    """As `kernels.problems.problems`, of bf16 or fp16 inputs and weights that `dtype` can hold."""
    drawn = problems(dtypes=st.just(dtype), **options)
    if dtype == torch.bfloat16:
        return drawn
    return drawn.filter(lambda problem: bool(rounded_weight(problem, dtype).isfinite().all()))


def rounded_weight(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The weight as a kernel for pairs of `dtype` decodes it: code times scale in fp32, rounded once."""
    weight = problem.weight
    if weight.codebook is not None:
        return decoded(weight).to(dtype)
    return (weight.packed.float() * (weight.absmax / 127.0).unsqueeze(1)).to(dtype)


def expected(problem: Problem, bare_codes: bool = False) -> tuple[Tensor, Tensor]:
    """The float64 result of a bf16 or fp16 problem and, for every output, how far a correct kernel may be from it.

    As `kernels.problems.expected` derives it, with u = 2^-22: the products of pairs are exact, but tensor cores add
    several of them at once and cut what lies below the largest, so an addition is off by less than two units in the
    last place. The side path is of bf16 pairs in bf16, in fp16 it is of fp32 numbers.

    `bare_codes`: the codes, not the weights, are rounded, and scales multiply sums in fp32. Each 4-bit weight is then
    off by u_dtype of itself, int8 is exact, and an underflow counts in units of the block's scale.
    """
    dtype = problem.x.dtype
    x, weight = problem.x.double(), decoded(problem.weight) if bare_codes else rounded_weight(problem, dtype)
    right = weight.double() if problem.grad else weight.double().t()
    side, side_weight = problem.side, problem.side_weight
    if side is not None and side_weight is not None:
        if dtype == torch.bfloat16:
            side, side_weight = side.bfloat16(), side_weight.bfloat16()
        extra = side_weight.double() if problem.grad else side_weight.double().t()
        x, right = torch.cat([x, side.double()], -1), torch.cat([right, extra])
    exact, size = x @ right, x.abs() @ right.abs()
    off = torch.zeros_like(size)
    if bare_codes:
        if problem.weight.codebook is not None:
            off = UNIT[dtype] * (problem.x.double().abs() @ weight.double().t().abs())
        off = off + (right.shape[0] + 7) * 2.0**-149 * block_unit(problem.weight)
    if problem.bias is not None:
        exact, size = exact + problem.bias.double(), size + problem.bias.double().abs()
    n = right.shape[0] + 7
    u = 2.0**-22
    bound = n * u / (1 - n * u) * (size + off) + n * 2.0**-149 + off
    bound = bound + UNIT[dtype] * (exact.abs() + bound) + TINY[dtype]
    return exact, bound


def assert_within_bound(problem: Problem, actual: Tensor, bare_codes: bool = False) -> None:
    """Fails unless shape, dtype and every element of `actual` are right; infinite only where that may be."""
    assert_within(problem, actual, *expected(problem, bare_codes))
