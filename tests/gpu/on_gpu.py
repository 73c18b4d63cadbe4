"""Problems moved to a GPU, kernels forced, and how far a tensor core may be from the truth."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import strategies as st
from kernels import exact
from kernels.problems import FORMATS, LAYOUTS, TINY, UNIT, Problem, assert_within, block_unit, decoded, make
from torch import Tensor

from nybble.backends import cuda

#: The linear kernels that are compiled for a GPU; `forced` takes any of them, each runs where it can.
KERNELS = ("linear_small_m", "linear_wgmma", "linear_mma", "linear_fp32", "linear_int8", "dequantize + matmul")
DEQUANTIZE = "dequantize + matmul"
#: Hypothesis' examples a test; a sanitizer wants few.
EXAMPLES = int(os.environ.get("NYBBLE_GPU_EXAMPLES", "60"))


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Inside, `kernel` runs wherever it can instead of the one that would be chosen."""
    previous = cuda.core().force_kernel(kernel)
    try:
        yield
    finally:
        cuda.core().force_kernel(previous)


def there(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A copy on `device` with the same strides and offset, overlapping elements and all."""
    if tensor is None:
        return None
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def moved(problem: Problem, device: torch.device) -> Problem:
    """The problem on a GPU, its strides kept."""
    x = there(problem.x, device)
    assert x is not None
    side, side_weight = there(problem.side, device), there(problem.side_weight, device)
    return Problem(x, problem.weight.to(device), there(problem.bias, device), side, side_weight, problem.grad)


def explained(problem: Problem, compute: int = 0) -> dict[str, str]:
    """Which kernel runs it, if its operands are aligned."""
    n, k = problem.weight.shape
    m = math.prod(problem.x.shape[:-1])
    int8 = problem.weight.codebook is None
    block = 64 if int8 else problem.weight.block_size
    return cuda.explain_linear(n, k, m, problem.x.dtype, int8, problem.grad, compute, block, problem.x.device)


def expected(problem: Problem) -> tuple[Tensor, Tensor]:
    """The float64 result and, for every output, how far a correct kernel of any kind may be from it.

    fp32 kernels: gamma_n * sum |x_i| |w_i| with the unit roundoff 2^-24, as in kernels.problems.

    Tensor cores multiply pairs exactly and add p >= 4 of them and the accumulator at once: every term is aligned to the
    largest and cut off, not rounded, below its 24th bit at the latest (Fasi et al., PeerJ CS 7:e330, 2021; Khattak and
    Mikaitis, arXiv 2512.07004: 2 bits more on Hopper). So each of the p + 1 terms and the result lose less than 2^-23
    of the largest of them, which is at most S = sum |x_i| |w_i|: (p + 2) / p * 2^-23 S for each product, at most
    1.5 * 2^-23 S, below the unit 2^-22 that stands here for the two numbers.

    A weight is rounded to the input's dtype once, as a product code * scale or as a bare code: UNIT of itself (two
    units, rounded twice, in `dequantize + matmul` with fp16's side path in fp32); bare codes underflow in units of the
    largest scale. The side path's operands are rounded likewise.
    """
    dtype = problem.x.dtype
    pairs = dtype != torch.float32
    unit = 2.0**-22 if pairs else 2.0**-24
    x, weight = problem.x.double(), decoded(problem.weight).double()
    right = weight if problem.grad else weight.t()
    if problem.side is not None and problem.side_weight is not None:
        extra = problem.side_weight.double()
        x = torch.cat([x, problem.side.double()], -1)
        right = torch.cat([right, extra if problem.grad else extra.t()])
    exact, size = x @ right, x.abs() @ right.abs()
    if problem.bias is not None:
        exact, size = exact + problem.bias.double(), size + problem.bias.double().abs()
    n = right.shape[0] + 7
    bound = n * unit / (1 - n * unit) * size + 3 * n * 2.0 ** (-126 if pairs else -150)
    if pairs:
        # of the weight; of both sides of the side path
        bound = bound + 2.01 * UNIT[dtype] * size + TINY[dtype] * (x.abs().sum(-1, keepdim=True) + right.abs().sum(0))
        bound = bound + 2.0**-126 * (1 + block_unit(problem.weight)) * (x.abs().sum(-1, keepdim=True))
        roundings = 2 if explained(problem)["kernel"] == DEQUANTIZE else 1
        bound = bound + roundings * (UNIT[dtype] * (exact.abs() + size * UNIT[dtype] + bound) + TINY[dtype])
        if roundings == 2:
            bound = bound + UNIT[dtype] * size  # the part without side path may be larger than the sum
    return exact, bound


def assert_within_bound(problem: Problem, actual: Tensor) -> None:
    """Fails unless shape, dtype and every element of `actual` are right; infinite only where that may be."""
    assert_within(problem, actual, *expected(problem), by=f"{explained(problem)['kernel']}, ")


def assert_exactly(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fails unless both are equal, element by element; NaN is equal to nothing."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    wrong = actual != expected
    if bool(wrong.any()):
        at = wrong.nonzero()
        first = tuple(at[0].tolist())
        rows, columns = (at[:, i].unique().numel() for i in (0, -1))
        raise AssertionError(
            f"{what}: {at.shape[0]} of {wrong.numel()} elements are wrong, in {rows} rows and {columns} columns; "
            f"the first at {first}: {actual[first].item()}, expected {expected[first].item()}"
        )


def poison(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """NaN in the memory that the allocator gives to the next tensor of this size, as far as it keeps to its habits."""
    torch.full(shape, float("nan"), dtype=dtype, device=device)


def run_exactly(problem: Problem) -> None:
    """Runs it on poisoned memory and compares every bit with the only right answer."""
    n, k = problem.weight.shape
    poison(problem.x.device, (*problem.x.shape[:-1], k if problem.grad else n), problem.x.dtype)
    actual = problem.run()
    kernel = explained(problem)["kernel"]
    if kernel == DEQUANTIZE and problem.side is not None and problem.x.dtype != torch.float32:
        assert_within_bound(problem, actual)  # rounded between the product and the side path
    else:
        assert_exactly(actual, exact.answer(problem), f"{kernel}, {problem}")


_ROWS = st.one_of(st.sampled_from((1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129)), st.integers(1, 300))
_COLUMNS = st.one_of(st.sampled_from((1, 8, 16, 63, 64, 65, 127, 128, 129, 192, 256)), st.integers(1, 300))
_CONTRACTIONS = st.one_of(
    st.sampled_from((1, 31, 32, 63, 64, 65, 96, 128, 192, 256, 320, 512, 1024, 1088, 2048)), st.integers(1, 700)
)
_dtypes = st.sampled_from((torch.bfloat16, torch.float16, torch.float32))


@st.composite
def problems(draw: st.DrawFn, grad: bool | None = None) -> Problem:
    """Any problem of ordinary numbers, made on the CPU; for fp16 none that it overflows by."""
    grad = draw(st.booleans()) if grad is None else grad
    dtype = draw(_dtypes)
    n, k = draw(_COLUMNS), draw(_CONTRACTIONS)
    if grad:
        n, k = draw(st.one_of(_CONTRACTIONS, st.integers(1, 40).map(lambda i: 8 * i))), draw(_COLUMNS)
    if draw(st.booleans()):
        k = -(-k // 64) * 64  # what the fast kernels take
    magnitudes = st.sampled_from(("normal", "normal", "magnitudes")) if dtype != torch.float16 else st.just("normal")
    return make(
        n,
        k,
        draw(_ROWS),
        draw(st.sampled_from(FORMATS)),
        draw(st.sampled_from((32, 64, 64, 128, 256, 1024, 4096))),
        nested=draw(st.booleans()),
        dtype=dtype,
        bias=draw(st.one_of(st.none(), _dtypes)),
        rank=draw(st.one_of(st.just(0), st.sampled_from((1, 8, 16, 64, 65)))),
        side=draw(_dtypes),
        side_weight=draw(_dtypes),
        layout=draw(st.one_of(st.just("contiguous"), st.sampled_from(LAYOUTS))),
        x_kind=draw(magnitudes),
        grad=grad,
        seed=draw(st.integers(0, 2**31 - 10)),
    )


@st.composite
def integer_problems(draw: st.DrawFn, columns: int, contraction: int, rows: int) -> dict[str, object]:
    """Arguments of `exact.make`, sizes up to these."""
    grad = draw(st.booleans())
    n = draw(st.integers(1, columns))
    k = draw(st.one_of(st.integers(1, contraction), st.integers(1, contraction // 64 + 1).map(lambda i: 64 * i)))
    if grad and draw(st.booleans()):
        n = -(-n // 8) * 8
    return {
        "n": n,
        "k": k,
        "m": draw(st.one_of(st.integers(1, 20), st.integers(1, rows))),
        "int8": draw(st.booleans()),
        "block": draw(st.sampled_from((32, 64, 64, 128, 1024, 4096))),
        "nested": draw(st.booleans()),
        "dtype": draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))),
        "bias": draw(st.booleans()),
        "rank": draw(st.sampled_from((0, 0, 1, 16, 65))),
        "grad": grad,
        "seed": draw(st.integers(0, 2**31 - 10)),
    }
