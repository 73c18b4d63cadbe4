"""The kernels for inputs of any shape, `linear_mma` and `linear_fp32`, against float64 within derived bounds."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import gpu_problems
from kernels import problems as any_problems
from kernels.gpu_problems import pair_problems, run
from kernels.problems import CUSTOM, LAYOUTS, Problem, make, problems
from shim.guarded import guarded
from torch import Tensor

KERNELS = {torch.bfloat16: "linear_mma", torch.float16: "linear_mma", torch.float32: "linear_fp32"}
EVERY = pytest.mark.parametrize("dtype", KERNELS, ids=str)
GRAD = pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
FORMAT = pytest.mark.parametrize("format", ["nf4", "int8"])
NORMAL = st.just("normal")


def result(cuda: ModuleType, problem: Problem) -> Tensor:
    return run(cuda, problem, KERNELS[problem.x.dtype])


def assert_right(cuda: ModuleType, problem: Problem) -> Tensor:
    found = result(cuda, problem)
    within = any_problems if problem.x.dtype == torch.float32 else gpu_problems
    within.assert_within_bound(problem, found)
    return found


def of_any_dtype(**options: object) -> st.SearchStrategy[Problem]:
    return st.one_of(
        pair_problems(torch.bfloat16, **options),
        pair_problems(torch.float16, **options),
        problems(dtypes=st.just(torch.float32), **options),
    )


@settings(max_examples=150)
@given(problem=of_any_dtype())
def test_every_output_is_within_the_error_bound_of_its_sum(cuda: ModuleType, problem: Problem) -> None:
    assert_right(cuda, problem)


# (out_features, in_features): K % block != 0 with K % 16 == 0 is where bitsandbytes decodes wrongly.
STRADDLING = [(5, 96), (6, 127), (9, 144), (7, 400), (3, 1104), (67, 31), (2, 1057)]


@GRAD
@EVERY
def test_blocks_may_straddle_rows(cuda: ModuleType, dtype: torch.dtype, grad: bool) -> None:
    for n, k in STRADDLING:
        for m in (1, 17):
            for block in (32, 1024):
                problem = make(n, k, m, CUSTOM, block, dtype=dtype, grad=grad, nested=n % 2 == 0, seed=k + m)
                assert_right(cuda, problem)


@GRAD
@EVERY
@FORMAT
def test_many_tiles_and_rows(cuda: ModuleType, format: str, dtype: torch.dtype, grad: bool) -> None:
    # Every height of a tile (16, 64 and 128 rows of x), several tiles both ways, ranks of several steps.
    for n, k, m, rank in ((130, 288, 16, 3), (288, 160, 33, 70), (130, 128, 270, 16), (7, 300, 2100, 0)):
        problem = make(n, k, m, format, dtype=dtype, rank=rank, bias=dtype, grad=grad, seed=n)
        assert_right(cuda, problem)


@GRAD
@EVERY
@pytest.mark.parametrize("multiprocessors", [1, 2, 400])
def test_a_contraction_in_parts(
    cuda: ModuleType, shim: ModuleType, dtype: torch.dtype, grad: bool, multiprocessors: int
) -> None:
    # Of two tiles: one part, two, and three (fp32: six) of at least 8 steps.
    shim.device(80, multiprocessors)
    n, k = (1632, 130) if grad else (130, 1632)
    problem = make(n, k, 5, dtype=dtype, rank=3, bias=dtype, grad=grad, seed=n)
    found = assert_right(cuda, problem)
    for schedule in ("in order", "reverse"):
        shim.schedule(schedule)
        assert torch.equal(result(cuda, problem), found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_input_change_no_bit(cuda: ModuleType, layout: str) -> None:
    for dtype in KERNELS:
        for m, grad in ((4, False), (19, False), (19, True)):
            problem = make(64, 72, m, dtype=dtype, rank=5, layout=layout, grad=grad)
            strided = result(cuda, problem)
            problem.x = problem.x.contiguous()
            assert torch.equal(strided, result(cuda, problem))


@GRAD
@EVERY
@FORMAT
def test_the_address_of_the_weight_changes_no_bit(
    cuda: ModuleType, format: str, dtype: torch.dtype, grad: bool
) -> None:
    # Aligned to 16 bytes it is read 16 bytes at a time, else by the general path.
    problem = make(40, 160, 20, format, 32, dtype=dtype, grad=grad, rank=2)
    aligned = result(cuda, problem)
    packed = problem.packed
    for offset in (1, 2, 3, 8):
        memory = torch.zeros(packed.packed.numel() + 16, dtype=packed.packed.dtype)
        assert memory.data_ptr() % 16 == 0
        moved = memory[offset : offset + packed.packed.numel()].view(packed.packed.shape).copy_(packed.packed)
        found = run(cuda, problem, KERNELS[dtype], packed._replace(packed=moved))
        assert torch.equal(found, aligned), offset


@settings(max_examples=60)
@given(problem=of_any_dtype(kinds=NORMAL), end=st.booleans(), alignment=st.sampled_from((16, None)))
def test_nothing_is_touched_beside_the_operands(
    cuda: ModuleType, problem: Problem, end: bool, alignment: int | None
) -> None:
    expected = result(cuda, problem)

    def guard(tensor: Tensor | None, name: str) -> Tensor | None:
        return None if tensor is None else guarded(tensor, end, alignment, read_only=True, name=name)

    packed = problem.packed
    packed = packed._replace(
        **{
            name: guard(value, name)
            for name, value in zip(packed._fields, packed, strict=True)
            if isinstance(value, Tensor)
        }
    )
    guarded_x = guard(problem.x, "x")
    assert guarded_x is not None
    problem.x = guarded_x
    problem.bias = guard(problem.bias, "bias")
    problem.side, problem.side_weight = guard(problem.side, "side"), guard(problem.side_weight, "side_weight")
    # NaN is the poison: no operand holds one, so a NaN inside was never written.
    outs = []

    def new_output(x: Tensor, columns: int) -> Tensor:
        poison = torch.full((*x.shape[:-1], columns), float("nan"), dtype=x.dtype)
        outs.append(guarded(poison, end, alignment, name="out"))
        return outs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "new_output", new_output)
        found = run(cuda, problem, KERNELS[problem.x.dtype], packed)
    assert found.data_ptr() == outs[0].data_ptr()
    assert torch.equal(found, expected)


@settings(max_examples=20)
@given(problem=of_any_dtype(kinds=NORMAL), seed=st.integers(0, 2**31))
def test_every_schedule_gives_the_same_bits(cuda: ModuleType, shim: ModuleType, problem: Problem, seed: int) -> None:
    shim.seed(seed)
    found = result(cuda, problem)
    for schedule in ("in order", "reverse", "random"):
        shim.schedule(schedule)
        assert torch.equal(result(cuda, problem), found)


@settings(max_examples=25)
@given(problem=of_any_dtype(kinds=NORMAL))
def test_a_side_path_of_zeros_changes_no_bit(cuda: ModuleType, problem: Problem) -> None:
    # What makes a new LoRA layer equal to its base: B is zero forward; backward g B is zero.
    side, problem.side, side_weight, problem.side_weight = problem.side, None, problem.side_weight, None
    plain = result(cuda, problem)
    if side is None or side_weight is None:
        return
    problem.side, problem.side_weight = side, torch.zeros_like(side_weight)
    assert torch.equal(plain, result(cuda, problem))
    problem.side, problem.side_weight = torch.zeros_like(side), side_weight
    assert torch.equal(plain, result(cuda, problem))


@EVERY
@GRAD
def test_not_a_number_stays_in_its_row(cuda: ModuleType, dtype: torch.dtype, grad: bool) -> None:
    for m in (1, 9, 33):
        for n, k in ((20, 50), (64, 96)):
            problem = make(n, k, m, dtype=dtype, grad=grad)
            problem.x[m - 1, 3] = float("nan")
            found = result(cuda, problem)
            assert bool(found[m - 1].isnan().all())
            assert not bool(found[: m - 1].isnan().any())


@EVERY
@GRAD
@FORMAT
def test_a_damaged_scale_stays_where_its_weights_count(
    cuda: ModuleType, format: str, dtype: torch.dtype, grad: bool
) -> None:
    # The last block of row 30 of a weight whose rows end inside a tile: beyond them nothing of it may count.
    problem = make(34, 96, 20, format, 32, dtype=dtype, grad=grad, nested=False)
    absmax = problem.packed.absmax.clone()
    absmax[30 if format == "int8" else 30 * 3 + 2] = float("nan")
    found = run(cuda, problem, KERNELS[dtype], problem.packed._replace(absmax=absmax))
    bad = found.isnan().any(0).nonzero().flatten().tolist()
    assert bad == (list(range(0 if format == "int8" else 64, 96)) if grad else [30])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1)])
@EVERY
@FORMAT
def test_empty_and_single_sizes(cuda: ModuleType, format: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for m in (0, 1, 17):
        for grad in (False, True):
            for rank in (0, 2):
                assert_right(cuda, make(*shape, m, format, bias=torch.float32, rank=rank, grad=grad, dtype=dtype))


def test_results_beyond_fp16_are_infinite_and_others_are_not(cuda: ModuleType) -> None:
    for m in (2, 20):
        problem = make(16, 64, m, "int4", dtype=torch.float16, nested=False)
        problem.x = torch.full((m, 64), 6e4, dtype=torch.float16)
        assert bool(assert_right(cuda, problem).isinf().any())


@GRAD
def test_a_side_path_beyond_fp16_counts_in_full(cuda: ModuleType, grad: bool) -> None:
    # LoRA's scaled product is fp32: a number that fp16 cannot hold, times a small one, is an ordinary result.
    problem = make(40, 70, 20, dtype=torch.float16, rank=3, grad=grad)
    assert problem.side is not None and problem.side_weight is not None
    problem.side, problem.side_weight = problem.side * 1e7, problem.side_weight * 1e-7
    assert bool(assert_right(cuda, problem).isfinite().all())
