"""`compute="int8"` of every instruction set against float64, within the bound that linear_int8.inl states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.problems import DTYPES, LAYOUTS, TINY, UNIT, Problem, decoded, make, problems, values
from torch import Tensor

from nybble import QuantConfig, QuantTensor, _core, explain, ops, reference
from nybble.backends import cpu

GROUP = 512  # columns of a 4-bit weight that share an int8 scale
forward = problems(grad=False)


def run(problem: Problem, outlier_threshold: float = 0.0) -> Tensor:
    packed = problem.packed._replace(compute=1, outlier_threshold=outlier_threshold)
    previous = _core.force_kernel("linear_int8")  # or one or two rows would be computed exactly
    try:
        return ops.linear(problem.x, packed, problem.bias, problem.side, problem.side_weight)
    finally:
        _core.force_kernel(previous)


def group_steps(weight: QuantTensor) -> Tensor:
    """[N, K], the step g to which a kernel rounds each 4-bit weight: its group's largest magnitude / 127."""
    rows, columns = weight.shape
    absmax = weight.absmax
    if weight.is_nested:
        absmax = reference.nested_dequantize(absmax, weight.nested_absmax, weight.nested_map, weight.nested_offset)
    scales = absmax.double().abs().repeat_interleave(weight.block_size)[: rows * columns].reshape(rows, columns)
    padded = torch.nn.functional.pad(scales, (0, -columns % GROUP)).unflatten(1, (-(-columns // GROUP), GROUP))
    largest = padded.amax(2).repeat_interleave(GROUP, 1)[:, :columns]
    return largest * weight.codebook.double().abs().max() / 127


def expected(problem: Problem) -> tuple[Tensor, Tensor]:
    """The float64 product with the decoded weight and, for every output, how far a correct kernel may be from it.

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
    g = torch.zeros_like(weight) if problem.weight.codebook is None else group_steps(problem.weight)
    half = 0.5 + 127 * 5 * 2.0**-24
    exact = x @ weight.t()
    bound = half * s * weight.abs().sum(1) + (x.abs() + half * s) @ (half * g).t()
    size = (x.abs() + s) @ (weight.abs() + g).t()
    side, side_weight = problem.side, problem.side_weight
    rank = 0
    if side is not None and side_weight is not None:
        rank = side.shape[-1]
        native = cpu.explain_linear(rows, k, 16, problem.x.dtype, problem.weight.codebook is None, False)
        if native["compute"] != "fp32":
            side, side_weight = side.bfloat16(), side_weight.bfloat16()
            flushed = side.double().abs().sum(1, keepdim=True) + side_weight.double().abs().sum(1)
            bound = bound + 2.0**-126 * (3 * rank + flushed)
        exact = exact + side.double() @ side_weight.double().t()
        size = size + side.double().abs() @ side_weight.double().abs().t()
    if problem.bias is not None:
        exact, size = exact + problem.bias.double(), size + problem.bias.double().abs()
    n = -(-k // GROUP) + rank + 10
    bound = bound + n * 2.0**-23 * size + n * 2.0**-149 * (1 + s)
    bound = bound + 127 * 2.0**-140 * (x.abs() + s).sum(1, keepdim=True)
    dtype = problem.x.dtype
    if dtype != torch.float32:
        bound = bound + UNIT[dtype] * (exact.abs() + bound) + TINY[dtype]
    return exact, bound


def assert_within_bound(problem: Problem, actual: Tensor) -> None:
    exact, bound = expected(problem)
    assert actual.dtype == problem.x.dtype
    assert actual.shape == exact.shape
    close = (actual.double() - exact).abs() <= bound
    overflows = actual.isinf() & (actual.sign() * exact + bound >= torch.finfo(actual.dtype).max)
    wrong = ~(close | overflows)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{problem}: {int(wrong.sum())} of {wrong.numel()} elements are off; at {at}: {actual[at].item()}, "
            f"expected {exact[at].item()} within {bound[at].item()}"
        )


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


@settings(max_examples=150)
@given(problem=forward)
def test_every_output_is_within_the_stated_error(isa: str, problem: Problem) -> None:
    actual = run(problem)
    problem = flat(problem)
    assert_within_bound(problem, actual.flatten(0, -2))


@settings(max_examples=50)
@given(problem=problems(grad=False, kinds=st.just("normal")), threshold=st.sampled_from((1.0, 2.0, 2.5, 3.5)))
def test_outlier_columns_are_multiplied_in_the_precision_of_the_side_path(
    isa: str, problem: Problem, threshold: float
) -> None:
    # They are a side path, by the definition: the rest is held to the stated error, which shrinks with its largest x.
    actual = run(problem, threshold)
    problem = aside(flat(problem), threshold)
    assert_within_bound(problem, actual.flatten(0, -2))


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_columns_groups_and_blocks_that_straddle(isa: str, format: str, dtype: torch.dtype) -> None:
    # More rows of x than share one decode (1024); several tiles of rows of W; blocks longer than a group.
    for n, k, m, rank, block in (
        (66, 40, 1037, 3, 64),
        (300, 34, 33, 0, 32),
        (258, 513, 70, 1, 4096),
        (5, 4304, 9, 0, 64),
    ):
        problem = make(n, k, m, format, block, dtype=dtype, rank=rank, bias=dtype, seed=n)
        assert_within_bound(problem, run(problem))


def test_products_of_codes_are_exact(isa: str) -> None:
    # With a scale of 1 on both sides the result is the integer product itself; each is below 2^24.
    for n, k, m in ((70, 700, 37), (3, 129, 1), (20, 65, 16), (70, 192, 5), (100, 1088, 40), (33, 64, 64)):
        q = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(n))
        x = torch.randint(-127, 128, (m, k), generator=torch.Generator().manual_seed(m)).float()
        x[:, 0] = 127.0
        problem = make(n, k, m, "int8")
        weight = problem.packed._replace(packed=q, absmax=torch.full((n,), 127.0), compute=1)
        assert torch.equal(ops.linear(x, weight), (x.long() @ q.long().t()).float())


def test_long_sums_do_not_overflow(isa: str) -> None:
    # 127 * 127 * 140000 exceeds int32.
    for n, k in ((1, 140_000), (32, 140_032)):
        weight = make(n, 1, 1, "int8").packed._replace(
            packed=torch.full((n, k), 127, dtype=torch.int8), absmax=torch.ones(n), in_features=k, compute=1
        )
        for m in (2, 18, 34):
            found = ops.linear(torch.ones(m, k), weight)
            torch.testing.assert_close(found, torch.full((m, n), float(k)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 128, 1024, 4096])
def test_long_rows_of_whole_blocks(isa: str, block: int, nested: bool) -> None:
    # Multiples of 128 columns: whole groups and not, more than 4096, blocks that hold several groups or rows.
    for n, k, m in ((40, 4480, 17), (33, 8320, 3), (70, 640, 70), (5, 4224, 9), (31, 128, 1)):
        problem = make(n, k, m, "nf4", block, nested=nested, dtype=torch.bfloat16, seed=k)
        assert_within_bound(problem, run(problem))


@pytest.mark.parametrize("k", [640, 600])
@pytest.mark.parametrize("block", [64, 128])
def test_a_damaged_scale_shows_in_its_row_and_no_other(isa: str, k: int, block: int) -> None:
    problem = make(40, k, 3, "nf4", block, nested=False)
    before = run(problem)
    others = [column for column in range(40) if column != 7]
    for first, last, scale in ((-1, None, torch.nan), (-1, None, torch.inf), (0, None, 0.0)):
        absmax = problem.weight.absmax.clone()
        inside = slice(-(-7 * k // block), 8 * k // block)  # the blocks that lie wholly in row 7
        absmax[inside][first:last] = scale
        after = ops.linear(problem.x, problem.packed._replace(absmax=absmax, compute=1))
        assert torch.equal(after[:, others], before[:, others])
        if scale != 0.0:
            assert bool(after[:, 7].isnan().all())
        elif k % block == 0:
            assert not bool(after[:, 7].any())


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_does(isa: str, format: str, bad: float) -> None:
    for k in (70, 600):
        problem = make(19, k, 18, format, rank=2)
        before = run(problem)
        for row, column in ((0, 0), (17, k - 1)):
            problem.x[row, column] = bad
        after = run(problem)
        assert bool(after[[0, 17]].isnan().all())
        assert torch.equal(after[1:17], before[1:17])


def test_rows_of_zeros_give_the_bias_alone(isa: str) -> None:
    problem = make(19, 70, 3, "nf4", bias=torch.float32)
    problem.x.zero_()
    assert problem.bias is not None
    assert torch.equal(run(problem), problem.bias.expand(3, 19))


def test_rows_of_any_magnitude_keep_their_precision(isa: str) -> None:
    # 127 / absmax overflows for the smallest; scaling a row by a power of two must not change its codes.
    problem = make(9, 96, 1, "int8")
    row = values("normal", 1, 96, dtype=torch.float32, seed=3)
    expected_row = run(Problem(x=row, weight=problem.weight)).double()
    for exponent in (-120, -60, 0, 60, 110):
        found = run(Problem(x=row * 2.0**exponent, weight=problem.weight)).double()
        torch.testing.assert_close(found / 2.0**exponent, expected_row, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_input_change_no_bit_of_int8(isa: str, layout: str) -> None:
    for dtype in DTYPES:
        problem = make(37, 66, 19, dtype=dtype, rank=5, layout=layout)
        strided = run(problem)
        problem.x = problem.x.contiguous()
        assert torch.equal(strided, run(problem))


@settings(max_examples=25)
@given(problem=forward)
def test_int8_gives_the_same_bits_for_any_number_of_threads(
    isa: str, threads: Callable[[int], None], problem: Problem
) -> None:
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(problem))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_int8_gives_the_same_bits_when_rows_are_split(isa: str, threads: Callable[[int], None]) -> None:
    problem = make(40, 130, 1500, dtype=torch.bfloat16, rank=3)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(problem))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@given(st.integers(0, 2**31), st.sampled_from(("nf4", "int4", "fp4", "int8")))
@settings(max_examples=5)
def test_the_error_stays_below_that_of_the_format(seed: int, format: str) -> None:
    # Relative root mean square for Gaussian x and w. Activations: absmax is about 3.5 sigma at K = 1024, so a step's
    # error is 3.5 / 127 / sqrt(12) = 0.008 of sigma; weights: the same at most. 4-bit formats themselves: 0.09 or more.
    weight = values("normal", 64, 1024, dtype=torch.float32, seed=seed)
    x = values("normal", 32, 1024, dtype=torch.float32, seed=seed + 1)
    problem = Problem(x=x, weight=QuantTensor.quantize(weight, QuantConfig(format=format, double_quant=False)))
    exact = x.double() @ decoded(problem.weight).double().t()
    assert float((run(problem).double() - exact).norm() / exact.norm()) < 0.015


def test_explain_names_int8(isa: str) -> None:
    for m in (1, 2):
        assert explain((64, 128), m=m, compute="int8").kernel == "linear_small_m"
        assert explain((64, 124), m=m, compute="int8").kernel == "linear_int8"
    for m in (3, 8, 9, 300):
        found = explain((64, 128), m=m, compute="int8")
        assert (found.kernel, found.compute) == ("linear_int8", "int8 x int8, int32 accumulation")
    assert "int8" not in explain((64, 128), m=9, compute="int8", grad_input=True).compute
