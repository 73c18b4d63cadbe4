"""How far `compute="int8"` may be from the float64 product: the bound that the kernels state."""

from __future__ import annotations

from dataclasses import replace

import torch
from kernels.problems import TINY, UNIT, Problem, assert_within, decoded
from torch import Tensor

from nybble import QuantTensor, reference
from nybble.backends import cpu


def group_steps(weight: QuantTensor, group: int) -> Tensor:
    """[N, K], the step g to which a kernel rounds each 4-bit weight: its group's largest magnitude / 127."""
    rows, columns = weight.shape
    absmax = weight.absmax
    if weight.is_nested:
        absmax = reference.nested_dequantize(absmax, weight.nested_absmax, weight.nested_map, weight.nested_offset)
    scales = absmax.double().abs().repeat_interleave(weight.block_size)[: rows * columns].reshape(rows, columns)
    padded = torch.nn.functional.pad(scales, (0, -columns % group)).unflatten(1, (-(-columns // group), group))
    largest = padded.amax(2).repeat_interleave(group, 1)[:, :columns]
    return largest * weight.codebook.double().abs().max() / 127


def expected(problem: Problem, group: int, side_in_fp32: bool) -> tuple[Tensor, Tensor]:
    """The float64 product with the decoded weight and, for every output, how far a correct kernel may be from it.

    `group`: columns of a 4-bit weight that share an int8 scale.

    With s = absmax / 127 of a row of x, q = round(x * (127 / absmax)) has |x - s q| <= s/2 besides the roundings of
    that product, three of 2^-24 each of at most 127 steps. Likewise |w - g c| <= g/2 for a 4-bit weight, with four
    roundings (g, its reciprocal, the block's factor, the product) and one in the decoded w. So the output is off by
        s/2 sum |w|  +  sum (|x| + s/2) g/2                                (for int8 weights g = 0 here)
    Sums of products of codes are exact; over the groups, rank and bias at most n fp32 roundings follow, of terms that
    together are at most `size`.

    Underflow: weights below 127 * 2^-140 may become zero; an fp32 operation is off by 2^-150, in units of x's scale
    before that is multiplied in; bf16 pairs of the side path take denormals as zero, as in `kernels.problems`.
    """
    x, weight = problem.x.double(), decoded(problem.weight).double()
    rows, k = weight.shape
    absmax = x.abs().amax(1, keepdim=True) if k else x.new_zeros(x.shape[0], 1)
    s = absmax / 127
    g = torch.zeros_like(weight) if problem.weight.codebook is None else group_steps(problem.weight, group)
    half = 0.5 + 127 * 5 * 2.0**-24
    exact = x @ weight.t()
    bound = half * s * weight.abs().sum(1) + (x.abs() + half * s) @ (half * g).t()
    size = (x.abs() + s) @ (weight.abs() + g).t()
    side, side_weight = problem.side, problem.side_weight
    rank = 0
    if side is not None and side_weight is not None:
        rank = side.shape[-1]
        native = cpu.explain_linear(rows, k, 16, problem.x.dtype, problem.weight.codebook is None, False)
        if native["compute"] != "fp32" and not side_in_fp32:
            side, side_weight = side.bfloat16(), side_weight.bfloat16()
            flushed = side.double().abs().sum(1, keepdim=True) + side_weight.double().abs().sum(1)
            bound = bound + 2.0**-126 * (3 * rank + flushed)
        exact = exact + side.double() @ side_weight.double().t()
        size = size + side.double().abs() @ side_weight.double().abs().t()
    if problem.bias is not None:
        exact, size = exact + problem.bias.double(), size + problem.bias.double().abs()
    n = -(-k // group) + rank + 10
    bound = bound + n * 2.0**-23 * size + n * 2.0**-149 * (1 + s)
    bound = bound + 127 * 2.0**-140 * (x.abs() + s).sum(1, keepdim=True)
    dtype = problem.x.dtype
    if dtype != torch.float32:
        bound = bound + UNIT[dtype] * (exact.abs() + bound) + TINY[dtype]
    return exact, bound


def assert_within_bound(problem: Problem, actual: Tensor, group: int = 512, side_in_fp32: bool = False) -> None:
    """Fails unless shape, dtype and every element of `actual` are right; infinite only where that may be."""
    assert_within(problem, actual, *expected(problem, group, side_in_fp32))


def flat(problem: Problem) -> Problem:
    """Rows only: the bound is written for a matrix."""
    problem.x = problem.x.flatten(0, -2)
    problem.side = None if problem.side is None else problem.side.flatten(0, -2)
    return problem


def aside(problem: Problem, threshold: float) -> Problem:
    """The same product with its outlier columns, decoded whole, in the side path."""
    outlier = (problem.x.float().abs() >= threshold).any(0)
    left, right = problem.x[:, outlier].float(), decoded(problem.weight).float()[:, outlier]
    if problem.side is not None and problem.side_weight is not None:
        left, right = torch.cat([left, problem.side.float()], 1), torch.cat([right, problem.side_weight.float()], 1)
    return replace(problem, x=problem.x.masked_fill(outlier, 0.0), side=left, side_weight=right)
