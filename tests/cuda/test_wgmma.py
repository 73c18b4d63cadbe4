"""`linear_wgmma`, the kernel of Hopper's warpgroups, against float64 within derived bounds."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.gpu_problems import assert_within_bound, rounded_weight, run
from kernels.problems import CUSTOM, DTYPES, FORMATS, Problem, make
from shim.guarded import guarded
from torch import Tensor

from nybble.formats import BLOCK_SIZES

PAIRS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
GRAD = pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
FORMAT = pytest.mark.parametrize("format", ["nf4", "int8"])

KINDS = st.one_of(st.just("normal"), st.sampled_from(("normal", "large", "small", "magnitudes")))
# Tiles are of 32, 64, 128 and 256 rows of x.
ROWS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 129, 200, 256, 257, 300)
# One multiprocessor has all tiles, one after another; 132 have parts of the contraction of few.
MULTIPROCESSORS = (1, 2, 3, 132)


def result(cuda: ModuleType, problem: Problem) -> Tensor:
    return run(cuda, problem, "linear_wgmma")


def assert_right(cuda: ModuleType, problem: Problem) -> Tensor:
    found = result(cuda, problem)
    # Forward, int8 codes are multiplied as they are, and the sums by the scales of their rows.
    assert_within_bound(problem, found, bare_codes=problem.weight.codebook is None and not problem.grad)
    return found


def strided(x: Tensor, gap: int) -> Tensor:
    """The same rows, `gap` elements farther apart."""
    wide = x.new_full((x.shape[0], x.shape[1] + gap), float("nan"))
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@st.composite
def tile_problems(draw: st.DrawFn, kinds: st.SearchStrategy[str] = KINDS) -> Problem:
    """Any problem of the kernel: in_features a multiple of 64, rows of x aligned to 16 bytes."""
    dtypes = st.sampled_from(DTYPES)
    grad = draw(st.booleans())
    problem = make(
        draw(
            st.one_of(st.sampled_from((0, 8, 56, 64, 72, 128, 136, 200, 264)), st.integers(0, 40).map(lambda i: 8 * i))
        )
        if grad
        else draw(st.one_of(st.sampled_from((0, 1, 8, 63, 64, 65, 127, 128, 129)), st.integers(1, 260))),
        64 * draw(st.one_of(st.integers(1, 9), st.sampled_from((13, 16)))),
        draw(st.one_of(st.sampled_from((0, *ROWS)), st.integers(1, 70))),
        draw(st.sampled_from(FORMATS)),
        draw(st.one_of(st.sampled_from((32, 64)), st.sampled_from(BLOCK_SIZES))),
        nested=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float16))),
        bias=draw(st.one_of(st.none(), dtypes)),
        rank=draw(st.one_of(st.just(0), st.sampled_from((1, 8, 16, 33, 64, 65)), st.integers(1, 40))),
        side=draw(dtypes),
        side_weight=draw(dtypes),
        x_kind=draw(kinds),
        weight_kind=draw(kinds),
        grad=grad,
        seed=draw(st.integers(0, 2**31 - 10)),
    )
    problem.x = strided(problem.x, draw(st.sampled_from((0, 0, 8, 64))))
    return problem


def holds(problem: Problem) -> bool:
    """Whether the weight, rounded as it is decoded, is finite in fp16."""
    return bool(rounded_weight(problem, problem.x.dtype).isfinite().all())


@settings(max_examples=80)
@given(problem=tile_problems().filter(holds), multiprocessors=st.sampled_from(MULTIPROCESSORS))
def test_every_output_is_within_the_error_bound_of_its_sum(
    cuda: ModuleType, shim: ModuleType, problem: Problem, multiprocessors: int
) -> None:
    shim.device(90, multiprocessors)
    assert_right(cuda, problem)


@GRAD
@PAIRS
@FORMAT
@pytest.mark.parametrize("m", [32, 64, 128, 256])
def test_whole_tiles(cuda: ModuleType, shim: ModuleType, format: str, dtype: torch.dtype, grad: bool, m: int) -> None:
    # One multiprocessor: more steps than there are stages and chunks, and a second tile whose bytes are on their way
    # while the first is stored.
    shim.device(90, 1)
    n, k = (640, 256) if grad else (256, 640)
    assert_right(cuda, make(n, k, m, format, dtype=dtype, rank=16, bias=dtype, grad=grad, seed=m))


@GRAD
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_every_block_size(cuda: ModuleType, block: int, nested: bool, grad: bool) -> None:
    # 192 is no multiple of the blocks from 128 on, which straddle rows.
    for k in (192, 1024):
        problem = make(72, k, 20, CUSTOM, block, nested=nested, dtype=torch.bfloat16, grad=grad, seed=block)
        assert_right(cuda, problem)


@PAIRS
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
@pytest.mark.parametrize("m", [20, 260])
def test_the_schedule_of_blocks_and_threads_changes_no_bit(
    cuda: ModuleType, shim: ModuleType, dtype: torch.dtype, grad: bool, m: int
) -> None:
    n, k = (456, 192) if grad else (190, 448)
    for format in ("nf4", "int8"):
        problem = make(n, k, m, format, dtype=dtype, rank=3, bias=dtype, grad=grad)
        for multiprocessors in (1, 40):
            shim.device(90, multiprocessors)
            shim.schedule("random")
            found = assert_right(cuda, problem)
            for schedule in ("in order", "reverse", "random"):
                shim.schedule(schedule)
                assert torch.equal(result(cuda, problem), found)


@GRAD
@FORMAT
@pytest.mark.parametrize("m", [20, 100])
def test_a_row_of_x_that_is_not_finite_spoils_no_other(cuda: ModuleType, format: str, grad: bool, m: int) -> None:
    problem = make(72, 320, m, format, dtype=torch.bfloat16, grad=grad)
    found = result(cuda, problem)
    problem.x[0, 3], problem.x[0, 70] = float("inf"), float("nan")
    spoilt = result(cuda, problem)
    assert spoilt[0].isnan().all()
    assert torch.equal(spoilt[1:], found[1:])


@GRAD
def test_expanded_rows(cuda: ModuleType, grad: bool) -> None:
    problem = make(72, 320, 20, dtype=torch.float16, layout="expanded", grad=grad)
    assert problem.x.stride(0) == 0
    found = assert_right(cuda, problem)
    assert torch.equal(found, found[:1].expand(20, -1))


@GRAD
def test_a_side_path_beyond_the_range_of_fp16(cuda: ModuleType, grad: bool) -> None:
    problem = make(72, 128, 19, dtype=torch.float16, rank=37, grad=grad)
    problem.side = problem.side * 1e8
    problem.side_weight = problem.side_weight * 1e-8
    assert_right(cuda, problem)


@PAIRS
def test_grad_input_multiplies_the_weight_that_forward_does(cuda: ModuleType, dtype: torch.dtype) -> None:
    # The rows of the unit matrix select columns or rows of it, exactly.
    problem = make(128, 128, 128, dtype=dtype)
    problem.x = torch.eye(128, dtype=dtype)
    forward = result(cuda, problem)
    problem.grad = True
    assert torch.equal(result(cuda, problem), forward.t())
    assert torch.equal(forward.t(), rounded_weight(problem, dtype))


@settings(max_examples=40)
@given(
    problem=tile_problems(kinds=st.just("normal")),
    end=st.booleans(),
    multiprocessors=st.sampled_from(MULTIPROCESSORS),
)
def test_nothing_beyond_the_operands_is_touched(
    cuda: ModuleType, shim: ModuleType, problem: Problem, end: bool, multiprocessors: int
) -> None:
    shim.device(90, multiprocessors)

    def fenced(name: str, tensor: Tensor | None, alignment: int | None = None) -> Tensor | None:
        return None if tensor is None else guarded(tensor, end, alignment, read_only=True, name=name)

    packed = problem.packed
    tensors = {
        name: fenced(name, value, 16 if name == "packed" else None)
        for name, value in packed._asdict().items()
        if isinstance(value, Tensor)
    }
    moved = Problem(
        guarded(problem.x.contiguous(), end, 16, read_only=True, name="x"),
        problem.weight,
        fenced("bias", problem.bias),
        fenced("side", problem.side),
        fenced("side_weight", problem.side_weight),
        problem.grad,
    )
    found = run(cuda, moved, "linear_wgmma", packed._replace(**tensors))
    assert torch.equal(found, result(cuda, problem))
