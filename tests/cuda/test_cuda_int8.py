"""CUDA's `compute="int8"` in the shim: within the stated error of float64, with and without outlier columns."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.int8_bounds import aside, assert_within_bound, flat
from kernels.problems import DTYPES, Problem, make, problems, values
from torch import Tensor

from nybble import reference
from nybble.backends.weight import PackedWeight

GROUP = 128  # columns of a 4-bit weight that share an int8 scale


def run(cuda: ModuleType, problem: Problem, threshold: float = 0.0, packed: PackedWeight | None = None) -> Tensor:
    weight = (packed or problem.packed)._replace(compute=1, outlier_threshold=threshold)
    cuda.core().force_kernel("linear_int8")  # or few rows would be computed exactly
    return cuda.linear(problem.x, weight, problem.bias, problem.side, problem.side_weight)


def check(cuda: ModuleType, problem: Problem, threshold: float = 0.0) -> Tensor:
    found = run(cuda, problem, threshold)
    rows = flat(problem)
    if threshold:
        rows = aside(rows, threshold)
    assert_within_bound(rows, found.flatten(0, -2), GROUP, side_in_fp32=True)
    return found


@settings(max_examples=25)
@given(problem=problems(grad=False), seed=st.integers(0, 2**31))
def test_every_output_is_within_the_stated_error(
    cuda: ModuleType, shim: ModuleType, problem: Problem, seed: int
) -> None:
    shim.seed(seed)
    check(cuda, problem)


@settings(max_examples=20)
@given(
    problem=problems(grad=False, kinds=st.just("normal")),
    threshold=st.sampled_from((1.0, 2.0, 2.5, 3.5)),
    seed=st.integers(0, 2**31),
)
def test_outlier_columns_are_not_rounded(
    cuda: ModuleType, shim: ModuleType, problem: Problem, threshold: float, seed: int
) -> None:
    shim.seed(seed)
    check(cuda, problem, threshold)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_tiles_steps_and_rows_in_parts(cuda: ModuleType, capability: int, format: str) -> None:
    # In place: whole steps and not, more than one tile each way; rows of x in parts where K is large; the large tiles.
    for n, k, m, dtype, rank in (
        (130, 416, 70, torch.bfloat16, 3),
        (16, 8192, 70, torch.float16, 0),
        (33, 1024, 5, torch.float32, 40),
    ):
        check(cuda, make(n, k, m, format, 64, dtype=dtype, rank=rank, bias=dtype, seed=n))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_large_tiles(cuda: ModuleType, shim: ModuleType, capability: int, format: str) -> None:
    shim.device(capability, 1)  # they are chosen where they fill the GPU
    check(cuda, make(300, 160, 129, format, 32, dtype=torch.bfloat16, rank=2, bias=torch.float32), 2.5)
    check(cuda, make(256, 1152, 20, format, 64, dtype=torch.float16))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_weights_that_are_not_read_in_place(cuda: ModuleType, format: str) -> None:
    # Rows that begin anywhere, their codes written in parts.
    for n, k, m in ((300, 1001, 3), (5, 130, 66)):
        check(cuda, make(n, k, m, format, 64, dtype=torch.bfloat16, seed=n), 3.0)


def test_products_of_codes_are_exact(cuda: ModuleType) -> None:
    for n, k, m in ((70, 720, 37), (3, 129, 1), (20, 64, 16)):
        q = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(n))
        x = torch.randint(-127, 128, (m, k), generator=torch.Generator().manual_seed(m)).float()
        x[:, 0] = 127.0
        problem = make(n, k, m, "int8")
        problem.x = x
        packed = problem.packed._replace(packed=q, absmax=torch.full((n,), 127.0))
        assert torch.equal(run(cuda, problem, packed=packed), (x.long() @ q.long().t()).float())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
def test_blocks_of_every_kind(cuda: ModuleType, block: int, nested: bool) -> None:
    for n, k in ((17, 480), (9, 4224)):  # rows that begin within a block, blocks that hold several steps
        check(cuda, make(n, k, 4, "nf4", block, nested=nested, dtype=torch.bfloat16, seed=k))


@pytest.mark.parametrize("row", [0, 7])
@pytest.mark.parametrize("k", [640, 608, 600])  # whole steps, a part of one, rows that begin anywhere
def test_a_damaged_scale_shows_in_its_row_and_no_other(cuda: ModuleType, k: int, row: int) -> None:
    problem = make(40, k, 3, "nf4", 32, nested=False)
    before = run(cuda, problem)
    others = [column for column in range(40) if column != row]
    for first, last, scale in ((-1, None, torch.nan), (-1, None, torch.inf), (0, 1, torch.nan), (0, None, 0.0)):
        absmax = problem.weight.absmax.clone()
        inside = slice(-(-row * k // 32), (row + 1) * k // 32)  # the blocks that lie wholly in the row
        absmax[inside][first:last] = scale
        after = run(cuda, problem, packed=problem.packed._replace(absmax=absmax))
        assert torch.equal(after[:, others], before[:, others])
        if scale != 0.0:
            assert bool(after[:, row].isnan().all())
        elif k % 32 == 0:
            assert not bool(after[:, row].any())


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_does(cuda: ModuleType, format: str) -> None:
    for bad in (torch.nan, torch.inf):
        problem = make(19, 96, 18, format, rank=2)
        before = run(cuda, problem)
        for row, column in ((0, 0), (17, 95)):
            problem.x[row, column] = bad
        after = run(cuda, problem)
        assert bool(after[[0, 17]].isnan().all())
        assert torch.equal(after[1:17], before[1:17])


def test_an_infinity_in_an_outlier_column_stays_in_its_row(cuda: ModuleType) -> None:
    problem = make(19, 96, 4, "int8", dtype=torch.bfloat16)
    problem.x[2, 5] = torch.inf
    found = run(cuda, problem, 6.0)
    expected = reference.linear_int8_activations(
        problem.x, problem.weight.dequantize(torch.float32), None, None, None, 6.0
    )
    assert not bool(found[[0, 1, 3]].isinf().any() | found[[0, 1, 3]].isnan().any())
    assert torch.equal(found[2].isinf(), expected[2].isinf())
    assert torch.equal(found[2].isnan(), expected[2].isnan())


def test_a_column_with_an_outlier_in_any_row_counts_for_all(cuda: ModuleType) -> None:
    # Every row reaches the threshold once, each in another column, so none may be overlooked; 70 columns are more than
    # a pass of the kernel takes. With the identity as the weight the outliers come out as they are.
    k = 256
    x = values("normal", 70, k, dtype=torch.float32, seed=1).clamp(-2, 2)
    outliers = [*range(0, 90, 3), *range(110, 149), k - 1]
    x[range(70), outliers] = 10.5
    problem = make(k, k, 70, "int8")
    problem.x = x
    packed = problem.packed._replace(packed=127 * torch.eye(k, dtype=torch.int8), absmax=torch.ones(k))
    found = run(cuda, problem, 10.5, packed)
    assert torch.equal(found[:, outliers], x[:, outliers])
    others = [column for column in range(k) if column not in outliers]
    assert bool(((found - x).abs()[:, others] <= 2.0 / 254 * 1.001).all())
    assert not torch.equal(found[:, others], x[:, others])


def test_rows_of_zeros_give_the_bias_alone(cuda: ModuleType) -> None:
    problem = make(19, 64, 3, "nf4", bias=torch.float32)
    problem.x.zero_()
    assert problem.bias is not None
    assert torch.equal(run(cuda, problem), problem.bias.expand(3, 19))


def test_rows_of_any_magnitude_keep_their_precision(cuda: ModuleType) -> None:
    problem = make(9, 96, 1, "int8")
    row = values("normal", 1, 96, dtype=torch.float32, seed=3)
    problem.x = row
    expected_row = run(cuda, problem).double()
    for exponent in (-120, -60, 60, 110):
        problem.x = row * 2.0**exponent
        found = run(cuda, problem).double()
        torch.testing.assert_close(found / 2.0**exponent, expected_row, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_order_of_threads_gives_the_same_bits(cuda: ModuleType, shim: ModuleType, dtype: torch.dtype) -> None:
    problem = make(70, 224, 66, dtype=dtype, rank=3, layout="row_stride")
    results = []
    for schedule in ("in order", "reverse", "random"):
        shim.schedule(schedule)
        results.append(run(cuda, problem, 2.5))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_explain_names_int8(cuda: ModuleType) -> None:
    def kernel(m: int, k: int = 128, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> str:
        return cuda.explain_linear(64, k, m, dtype, False, grad, 1, device=torch.device("cpu"))["kernel"]

    assert [kernel(m) for m in (1, 2, 16, 17, 300)] == [*["linear_small_m"] * 3, *["linear_int8"] * 2]
    assert [kernel(m, 124) for m in (2, 3)] == ["linear_mma", "linear_int8"]
    assert [kernel(m, dtype=torch.float32) for m in (2, 3)] == ["linear_fp32", "linear_int8"]
    assert kernel(300, 1 << 21) != "linear_int8"
    assert kernel(300, grad=True) == "linear_wgmma"
