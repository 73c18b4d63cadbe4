"""How far a linear kernel of Metal's may be from the truth: `problems.expected`, for what these kernels do."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from problems import TINY, UNIT, Problem, block_unit, decoded
from torch import Tensor


def rounds_weight(mps: ModuleType, problem: Problem) -> bool:
    """Whether the kernel rounds the weight to the activations' dtype."""
    m = math.prod(problem.x.shape[:-1])
    return mps.choose(m, problem.grad).library == "linear_tiles" and problem.x.dtype != torch.float32


def expected(problem: Problem, rounded: bool) -> tuple[Tensor, Tensor]:
    """The float64 result, and the bound for every output.

    A sum of n products in any order is off by at most gamma_n * sum |x_i| |w_i| (see `problems.expected`); n counts the
    contraction, the rank, the bias, and 7 more: a scale of a partial sum, partial sums of lanes, an int8 scale.

    Where the kernel rounds the weight, the reference does so too, as `dequantize` does it: nothing is allowed for it.

    Numbers below 2^-126 may count as 0: each factor, product or sum then loses up to 2^-126, once itself and times what
    it is multiplied by; a nested scale loses up to three times that. Where the scale multiplies sums of bare codes, the
    loss is in units of the scale.
    """
    x = problem.x.double()
    weight = problem.weight.dequantize(problem.x.dtype) if rounded else decoded(problem.weight)
    right = weight.double() if problem.grad else weight.double().t()
    if problem.side is not None and problem.side_weight is not None:
        extra = problem.side_weight.double() if problem.grad else problem.side_weight.double().t()
        x, right = torch.cat([x, problem.side.double()], -1), torch.cat([right, extra])
    exact, size = x @ right, x.abs() @ right.abs()
    if problem.bias is not None:
        exact, size = exact + problem.bias.double(), size + problem.bias.double().abs()
    n = right.shape[0] + 8

    def gamma(unit: float) -> float:
        return n * unit / (1 - n * unit)

    bound = (gamma(2.0**-24) + gamma(2.0**-53)) * size
    bound = bound + 3 * n * 2.0**-126 * (1 + block_unit(problem.weight))
    bound = bound + 4 * 2.0**-126 * (x.abs().sum(-1, keepdim=True) + right.abs().sum(0))
    dtype = problem.x.dtype
    if dtype != torch.float32:
        bound = bound + UNIT[dtype] * (exact.abs() + bound) + TINY[dtype]
    return exact, bound


def assert_within_bound(problem: Problem, actual: Tensor, rounded: bool) -> None:
    """Fails unless shape, dtype and every element of `actual` are right; infinite only where that may be."""
    exact, bound = expected(problem, rounded)
    assert actual.dtype == problem.x.dtype
    assert actual.shape == exact.shape
    close = (actual.double() - exact).abs() <= bound
    overflows = actual.isinf() & (actual.sign() * exact + bound >= torch.finfo(actual.dtype).max)
    unbounded = ~exact.isfinite() & ~actual.isfinite()  # a weight that leaves fp16's range, as `dequantize` has it
    wrong = ~(close | overflows | unbounded)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{problem}: {int(wrong.sum())} of {wrong.numel()} elements are off; at {at}: {actual[at].item()}, "
            f"expected {exact[at].item()} within {bound[at].item()}"
        )
