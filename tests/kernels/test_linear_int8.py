"""`compute="int8"` of every instruction set against float64, within the bound that linear_int8.inl states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.int8_bounds import aside, assert_within_bound, flat
from kernels.problems import DTYPES, LAYOUTS, Problem, decoded, make, problems, values
from torch import Tensor

from nybble import QuantConfig, QuantTensor, _core, explain, ops

forward = problems(grad=False)


def run(problem: Problem, outlier_threshold: float = 0.0) -> Tensor:
    packed = problem.packed._replace(compute=1, outlier_threshold=outlier_threshold)
    previous = _core.force_kernel("linear_int8")  # or one or two rows would be computed exactly
    try:
        return ops.linear(problem.x, packed, problem.bias, problem.side, problem.side_weight)
    finally:
        _core.force_kernel(previous)


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
