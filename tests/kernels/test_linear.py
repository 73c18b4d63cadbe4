"""The linear kernels of every instruction set against float64, within derived bounds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.problems import CUSTOM, DTYPES, LAYOUTS, Problem, assert_within_bound, explained, make, problems, values

from nybble import _core, ops
from nybble.backends import cpu

NORMAL = st.just("normal")


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Inside, `kernel` runs wherever it can instead of the one that would be chosen."""
    previous = _core.force_kernel(kernel)
    try:
        yield
    finally:
        _core.force_kernel(previous)


@settings(max_examples=200)
@given(problem=problems())
def test_every_output_is_within_the_error_bound_of_its_sum(isa: str, problem: Problem) -> None:
    assert_within_bound(problem, problem.run())


@pytest.mark.parametrize("kernel", ["linear_small_m", "linear_panel", "linear_tiles", "linear_tiles_few"])
@settings(max_examples=100)
@given(problem=problems())
def test_every_kernel_that_can_run_a_problem_is_right_about_it(isa: str, kernel: str, problem: Problem) -> None:
    with forced(kernel):
        assert_within_bound(problem, problem.run())


# (out_features, in_features): K % block != 0 with K % 16 == 0 is where bitsandbytes decodes wrongly.
STRADDLING = [(5, 96), (6, 127), (9, 144), (7, 400), (3, 4304), (67, 31), (2, 4097)]


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_may_straddle_rows(isa: str, dtype: torch.dtype, grad: bool) -> None:
    for n, k in STRADDLING:
        for m in (1, 3, 8, 9):
            for block in (64, 1024):
                for format in ("nf4", CUSTOM):
                    problem = make(n, k, m, format, block, dtype=dtype, grad=grad, nested=n % 2 == 0, seed=k + m)
                    assert_within_bound(problem, problem.run())


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_many_rows_columns_and_chunks(isa: str, format: str, dtype: torch.dtype, grad: bool) -> None:
    # More rows of x than share one decode (1024); a rank of more than one chunk (512); several tiles of columns.
    for n, k, m, rank in ((66, 40, 1037, 3), (3, 70, 17, 550), (300, 34, 33, 0), (34, 300, 33, 0), (1100, 5, 2, 1)):
        problem = make(n, k, m, format, dtype=dtype, rank=rank, bias=dtype, grad=grad, seed=n)
        assert_within_bound(problem, problem.run())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_input_change_no_bit(isa: str, layout: str) -> None:
    for dtype in DTYPES:
        for m, grad in ((4, False), (19, False), (19, True)):
            problem = make(37, 66, m, dtype=dtype, rank=5, layout=layout, grad=grad)
            strided = problem.run()
            problem.x = problem.x.contiguous()
            assert torch.equal(strided, problem.run())


@settings(max_examples=25)
@given(problem=problems(kinds=NORMAL))
def test_same_bits_for_any_number_of_threads(isa: str, threads: Callable[[int], None], problem: Problem) -> None:
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(problem.run())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_same_bits_for_any_number_of_threads_when_rows_are_split(isa: str, threads: Callable[[int], None]) -> None:
    # Few column tiles and many rows: the one case in which the thread count decides how rows of x are cut.
    for dtype in (torch.float32, torch.bfloat16):
        for grad in (False, True):
            problem = make(70, 70, 1200, dtype=dtype, rank=4, grad=grad)
            results = []
            for count in (1, 2, 3):
                threads(count)
                results.append(problem.run())
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


@settings(max_examples=25)
@given(problem=problems(kinds=NORMAL), cut=st.integers(1, 30))
def test_a_row_of_the_output_depends_on_its_row_of_the_input_alone(isa: str, problem: Problem, cut: int) -> None:
    # Within one kernel.
    m = problem.x.shape[0]
    if m == 0:
        return
    before, cut = explained(problem)["kernel"], min(cut, m)
    whole = problem.run()
    problem.x = problem.x[:cut]
    problem.side = None if problem.side is None else problem.side[:cut]
    if explained(problem)["kernel"] == before:
        assert torch.equal(whole[:cut], problem.run())


def test_the_first_rows_of_a_small_batch_have_the_same_bits_at_any_length(isa: str) -> None:
    # fp32: a bf16 result hides what differs in the last bits of its sum.
    problem = make(24, 4160, 8, dtype=torch.float32)
    whole, x = problem.run(), problem.x
    for m in range(1, 8):
        problem.x = x[:m]
        assert torch.equal(whole[:m], problem.run()), m


def test_an_extreme_row_changes_no_bit_of_the_others(isa: str) -> None:
    for format in ("nf4", "int8"):
        problem = make(24, 4160, 8, format, dtype=torch.float32, rank=3, bias=torch.float32)
        with forced("linear_small_m"):
            before = problem.run()
            problem.x[2] *= 1e35
            problem.x[5] *= 1e-36
            after = problem.run()
        assert_within_bound(problem, after)
        others = [0, 1, 3, 4, 6, 7]
        assert torch.equal(before[others], after[others])


@pytest.mark.parametrize("by", [1e-38, 1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("kernel", ["linear_small_m", "linear_panel", "linear_tiles", "linear_tiles_few"])
def test_codebooks_of_any_magnitude(isa: str, kernel: str, by: float) -> None:
    # The weights are ordinary: the scales make up for what the codebook lacks.
    for dtype in DTYPES:
        for m in (1, 7, 20):
            problem = make(48, 256, m, dtype=dtype, nested=False, rank=2)
            assert problem.weight.codebook is not None
            problem.weight.codebook = problem.weight.codebook * by
            problem.weight.absmax = (problem.weight.absmax / by).clamp(max=1e38)
            with forced(kernel):
                assert_within_bound(problem, problem.run())


@pytest.mark.parametrize("m", [1, 3, 5, 9, 20, 33])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
def test_not_a_number_stays_in_its_row(isa: str, m: int, grad: bool) -> None:
    for dtype in DTYPES:
        problem = make(20, 50, m, dtype=dtype, grad=grad)
        problem.x[m - 1, 3] = float("nan")
        result = problem.run()
        assert bool(result[m - 1].isnan().all())
        assert not bool(result[: m - 1].isnan().any())


@settings(max_examples=25)
@given(problem=problems(kinds=NORMAL))
def test_a_side_path_of_zeros_changes_no_bit(isa: str, problem: Problem) -> None:
    # What makes a new LoRA layer equal to its base: B is zero forward; backward g B is zero.
    side, problem.side, side_weight, problem.side_weight = problem.side, None, problem.side_weight, None
    plain = problem.run()
    if side is None or side_weight is None:
        return
    problem.side, problem.side_weight = side, torch.zeros_like(side_weight)
    assert torch.equal(plain, problem.run())
    problem.side, problem.side_weight = torch.zeros_like(side), side_weight
    assert torch.equal(plain, problem.run())


@settings(max_examples=25)
@given(problem=problems(kinds=NORMAL))
def test_every_output_is_written_and_nothing_beside_it(isa: str, problem: Problem) -> None:
    x = problem.x.flatten(0, -2).contiguous()
    columns = problem.weight.shape[1] if problem.grad else problem.weight.shape[0]
    guard = 64
    # NaN is the poison: no operand holds one, so a NaN inside was never written.
    memory = torch.full((guard + x.shape[0] * columns + guard,), float("nan"), dtype=x.dtype)
    out = memory[guard : memory.numel() - guard].view(x.shape[0], columns)
    side = None if problem.side is None else problem.side.flatten(0, -2).contiguous()
    cpu._run(x, problem.packed, problem.bias, side, problem.side_weight, out, problem.grad)
    assert not bool(out.isnan().any())
    assert bool(memory[:guard].isnan().all())
    assert bool(memory[memory.numel() - guard :].isnan().all())


def test_results_beyond_fp16_are_infinite_and_others_are_not(isa: str) -> None:
    for m in (2, 12):
        problem = make(16, 64, m, "int4", dtype=torch.float16, nested=False)
        problem.x = torch.full((m, 64), 6e4, dtype=torch.float16)
        result = problem.run()
        assert_within_bound(problem, result)
        assert bool(result.isinf().any())


def test_an_fp32_input_is_multiplied_in_fp32(isa: str) -> None:
    # bitsandbytes computes it in bf16. A bf16 x would lose these low bits: 1 + 2^-20 rounds to 1.
    for m in (1, 8, 9, 40):
        for grad in (False, True):
            problem = make(48, 48, m, grad=grad)
            problem.x = (
                torch.full((m, 48), 1.0) + 2.0**-20 * values("normal", m, 48, dtype=torch.float32, seed=3).sign()
            )
            assert_within_bound(problem, problem.run())


def test_an_fp16_input_keeps_all_its_bits(isa: str) -> None:
    for m in (1, 8, 9, 40):
        problem = make(48, 48, m, dtype=torch.float16)
        problem.x = (torch.full((m, 48), 1.0) + 2.0**-10).half()
        assert_within_bound(problem, problem.run())


def test_zero_stays_zero(isa: str) -> None:
    for dtype in DTYPES:
        for m in (1, 9):
            zeros = torch.zeros(m, 96, dtype=dtype)
            problem = make(7, 96, m, dtype=dtype)
            problem.x = zeros
            assert not bool(problem.run().any())
            problem = make(7, 96, m, "int8", dtype=dtype)
            problem.weight.packed.zero_()
            assert not bool(problem.run().any())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_empty_and_single_sizes(isa: str, format: str, shape: tuple[int, int]) -> None:
    for m in (0, 1, 8, 9):
        for grad in (False, True):
            for rank in (0, 2):
                problem = make(*shape, m, format, bias=torch.float32, rank=rank, grad=grad)
                assert_within_bound(problem, problem.run())


def test_leading_dimensions_are_kept(isa: str) -> None:
    problem = make(6, 10, 1)
    weight = problem.packed
    for lead in ((), (3,), (2, 3), (2, 0, 3), (1, 1, 1, 2)):
        x = torch.randn(*lead, 10)
        assert ops.linear(x, weight).shape == (*lead, 6)
        assert torch.equal(ops.linear(x, weight).reshape(-1, 6), ops.linear(x.reshape(-1, 10), weight))
        assert ops.grad_input(torch.randn(*lead, 6), weight).shape == (*lead, 10)


GUARDED = """
import ctypes, mmap, sys
import torch
from nybble import QuantConfig, QuantTensor, _core, ops

libc = ctypes.CDLL(None, use_errno=True)
PAGE, held = mmap.PAGESIZE, []

def at_the_end_of_a_page(tensor):
    '''A copy whose last byte is the last one before a page that nobody may touch.'''
    size = tensor.numel() * tensor.element_size()
    pages = -(-max(size, 1) // PAGE)
    area = mmap.mmap(-1, (pages + 1) * PAGE)
    held.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(start + pages * PAGE), PAGE, 0) == 0
    copy = torch.frombuffer(area, dtype=torch.uint8, count=pages * PAGE)[pages * PAGE - size :].view(tensor.dtype)
    return copy.view(tensor.shape).copy_(tensor)

torch.set_num_threads(1)
torch.manual_seed(0)
for format, n, k in (("nf4", 21, 70), ("nf4", 5, 127), ("fp4", 64, 128), ("int8", 21, 70), ("nf4", 130, 33)):
    tensor = QuantTensor.quantize(torch.randn(n, k), QuantConfig(format=format, double_quant=format != "int8"))
    plain = tensor.packed_weight()
    guarded = plain._make(at_the_end_of_a_page(t) if isinstance(t, torch.Tensor) else t for t in plain)
    for isa in _core.isas():
        _core.set_active_isa(isa)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for m in (1, 3, 9, 34):
                print(format, n, k, isa, dtype, m, file=sys.stderr)
                x, g, bias = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), torch.randn(n).to(dtype)
                a, b, left = torch.randn(3, k).to(dtype), torch.randn(n, 3).to(dtype), torch.randn(m, 3).to(dtype)
                gx, gg, gbias, ga, gb, gleft = (at_the_end_of_a_page(t) for t in (x, g, bias, a, b, left))
                assert torch.equal(ops.linear(gx, guarded, gbias, gleft, gb), ops.linear(x, plain, bias, left, b))
                assert torch.equal(ops.grad_input(gg, guarded, gleft, ga), ops.grad_input(g, plain, left, a))
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages with Linux's mprotect")
def test_nothing_is_read_past_the_end_of_an_operand() -> None:
    # A kernel that reads further hits a protected page, which ends the process: so it is one of its own.
    result = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, timeout=120, check=False)
    last = result.stderr.strip().splitlines()[-1:]
    assert result.returncode == 0 and result.stdout.strip() == "done", f"exit {result.returncode} at {last}"
