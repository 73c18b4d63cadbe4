"""`linear_small_m`, the kernel for at most 16 rows of x, against float64 within derived bounds."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.gpu_problems import assert_within_bound, run
from kernels.problems import CUSTOM, DTYPES, FORMATS, Problem, make
from shim.guarded import guarded
from torch import Tensor

from nybble.formats import BLOCK_SIZES

PAIRS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
FORMAT = pytest.mark.parametrize("format", ["nf4", "int8"])

# (capability, multiprocessors): 8 warps of 3 and 2 slots, 4 warps; 1 multiprocessor has all units, few share tiles.
DEVICES = [(90, 132), (90, 1), (80, 3), (80, 7), (86, 2), (90, 5)]
# Rows of x: up to 2 have their spans spread over the columns of a product, up to 8 share one, up to 16 have two.
ROWS = (1, 2, 3, 7, 8, 9, 15, 16)
KINDS = st.one_of(st.just("normal"), st.sampled_from(("normal", "large", "small", "magnitudes")))
NORMAL = st.just("normal")


def result(cuda: ModuleType, problem: Problem) -> Tensor:
    return run(cuda, problem, "linear_small_m")


def assert_right(cuda: ModuleType, problem: Problem) -> Tensor:
    found = result(cuda, problem)
    assert_within_bound(problem, found, bare_codes=True)
    return found


def strided(x: Tensor, gap: int) -> Tensor:
    """The same rows, `gap` elements farther apart."""
    wide = x.new_full((x.shape[0], x.shape[1] + gap), float("nan"))
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@st.composite
def small_problems(draw: st.DrawFn, kinds: st.SearchStrategy[str] = KINDS) -> Problem:
    """Any problem of the kernel: in_features a multiple of 64, rows of x aligned to 16 bytes."""
    dtypes = st.sampled_from(DTYPES)
    problem = make(
        draw(st.one_of(st.sampled_from((0, 1, 8, 15, 63, 64, 65, 128, 129, 200)), st.integers(1, 260))),
        64 * draw(st.one_of(st.integers(1, 9), st.sampled_from((31, 32, 33)))),
        draw(st.one_of(st.sampled_from((0, *ROWS)), st.integers(1, 16))),
        draw(st.sampled_from(FORMATS)),
        draw(st.one_of(st.sampled_from((32, 64)), st.sampled_from(BLOCK_SIZES))),
        nested=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float16))),
        bias=draw(st.one_of(st.none(), dtypes)),
        rank=draw(st.one_of(st.just(0), st.sampled_from((1, 2, 16, 31, 32, 33)), st.integers(1, 40))),
        side=draw(dtypes),
        side_weight=draw(dtypes),
        x_kind=draw(kinds),
        weight_kind=draw(kinds),
        seed=draw(st.integers(0, 2**31 - 10)),
    )
    problem.x = strided(problem.x, draw(st.sampled_from((0, 0, 8, 64))))
    return problem


@settings(max_examples=120)
@given(problem=small_problems(), device=st.sampled_from(DEVICES))
def test_every_output_is_within_the_error_bound_of_its_sum(
    cuda: ModuleType, shim: ModuleType, problem: Problem, device: tuple[int, int]
) -> None:
    shim.device(*device)
    assert_right(cuda, problem)


@PAIRS
@FORMAT
@pytest.mark.parametrize("m", ROWS)
def test_shapes_that_fill_tiles_and_units(cuda: ModuleType, format: str, dtype: torch.dtype, m: int) -> None:
    for n, k in ((64, 256), (128, 1024)):
        assert_right(cuda, make(n, k, m, format, dtype=dtype, rank=16, bias=dtype, seed=n))


@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_every_block_size(cuda: ModuleType, block: int, nested: bool) -> None:
    # 192 is no multiple of the blocks from 128 on, which straddle rows.
    for m in (1, 5, 12):
        for k in (192, 4096):
            assert_right(cuda, make(70, k, m, CUSTOM, block, nested=nested, dtype=torch.bfloat16, seed=block))


@PAIRS
@pytest.mark.parametrize("m", [1, 8, 16])
def test_the_schedule_of_blocks_and_threads_changes_no_bit(
    cuda: ModuleType, shim: ModuleType, dtype: torch.dtype, m: int
) -> None:
    # 3 tiles of 7 units of 64 rows, 2 of 14 of 128, in one block, in 3, and in one for each unit.
    for format, n, k in (("nf4", 190, 1792), ("int8", 190, 896)):
        problem = make(n, k, m, format, dtype=dtype, rank=3, bias=dtype)
        for multiprocessors in (1, 3, 40):
            shim.device(90, multiprocessors)
            shim.schedule("random")
            found = assert_right(cuda, problem)
            for schedule in ("in order", "reverse", "random"):
                shim.schedule(schedule)
                assert torch.equal(result(cuda, problem), found)


@PAIRS
@FORMAT
def test_a_row_alone_and_among_others_of_its_kernel(cuda: ModuleType, format: str, dtype: torch.dtype) -> None:
    # Columns of a product do not see one another.
    for rows in ((3, 8), (9, 16)):
        whole = make(100, 320, rows[1], format, dtype=dtype, rank=4, seed=7)
        found = result(cuda, whole)
        few = Problem(whole.x[: rows[0]], whole.weight, side=whole.side[: rows[0]], side_weight=whole.side_weight)
        assert torch.equal(result(cuda, few), found[: rows[0]])


@FORMAT
@pytest.mark.parametrize("m", [1, 8, 16])
def test_a_row_of_x_that_is_not_finite_spoils_no_other(cuda: ModuleType, format: str, m: int) -> None:
    problem = make(70, 320, m, format, dtype=torch.bfloat16)
    found = result(cuda, problem)
    problem.x[0, 3], problem.x[0, 300] = float("inf"), float("nan")
    spoilt = result(cuda, problem)
    assert spoilt[0].isnan().all()
    assert torch.equal(spoilt[1:], found[1:])


def test_expanded_rows(cuda: ModuleType) -> None:
    problem = make(70, 320, 5, dtype=torch.float16, layout="expanded")
    assert problem.x.stride(0) == 0
    found = assert_right(cuda, problem)
    assert torch.equal(found, found[:1].expand(5, -1))


def test_a_side_path_beyond_the_range_of_fp16(cuda: ModuleType) -> None:
    problem = make(70, 128, 11, dtype=torch.float16, rank=5)
    problem.side = problem.side * 1e8
    problem.side_weight = problem.side_weight * 1e-8
    assert_right(cuda, problem)


@settings(max_examples=40)
@given(problem=small_problems(kinds=NORMAL), end=st.booleans(), device=st.sampled_from(DEVICES))
def test_nothing_beyond_the_operands_is_touched(
    cuda: ModuleType, shim: ModuleType, problem: Problem, end: bool, device: tuple[int, int]
) -> None:
    shim.device(*device)

    def fenced(name: str, tensor: Tensor | None, alignment: int | None = None) -> Tensor | None:
        return None if tensor is None else guarded(tensor, end, alignment, read_only=True, name=name)

    packed = problem.packed
    tensors = {
        name: fenced(name, value, 16 if name == "packed" else None)
        for name, value in packed._asdict().items()
        if isinstance(value, Tensor)
    }
    x = guarded(problem.x.contiguous(), end, 16, read_only=True, name="x")
    moved = Problem(
        x,
        problem.weight,
        fenced("bias", problem.bias),
        fenced("side", problem.side),
        fenced("side_weight", problem.side_weight),
    )
    found = run(cuda, moved, "linear_small_m", packed._replace(**tensors))
    assert torch.equal(found, result(cuda, problem))
