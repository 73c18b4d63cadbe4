"""linear and grad_input on a GPU: every kernel, tiny shapes and those of real models, within bounds and exactly."""

from __future__ import annotations

import itertools

import gpu.needed  # noqa: F401  (skips this file without a GPU)
import pytest
import torch
from gpu.on_gpu import (
    DEQUANTIZE,
    EXAMPLES,
    KERNELS,
    assert_within_bound,
    explained,
    forced,
    integer_problems,
    moved,
    problems,
    run_exactly,
)
from hypothesis import given, settings
from kernels import exact
from kernels.problems import LAYOUTS, Problem, make, values

from nybble import reference
from nybble.backends import cuda

HALVES = (torch.bfloat16, torch.float16)
FASTER = ("linear_small_m", "linear_wgmma", "linear_mma", "linear_fp32")


def test_the_names_of_the_kernels_are_known_here(gpu: torch.device) -> None:
    assert ", ".join(KERNELS) == cuda.core().kernel_names()


@settings(max_examples=4 * EXAMPLES)
@given(problem=problems())
def test_every_output_is_within_the_error_bound_of_its_sum(gpu: torch.device, problem: Problem) -> None:
    problem = moved(problem, gpu)
    assert_within_bound(problem, problem.run())


@pytest.mark.parametrize("kernel", [*FASTER, DEQUANTIZE])
@settings(max_examples=EXAMPLES)
@given(problem=problems())
def test_every_kernel_that_can_run_a_problem_is_right_about_it(
    gpu: torch.device, kernel: str, problem: Problem
) -> None:
    problem = moved(problem, gpu)
    with forced(kernel):
        assert_within_bound(problem, problem.run())


@pytest.mark.parametrize("kernel", ["", *FASTER, DEQUANTIZE])
@settings(max_examples=EXAMPLES)
@given(arguments=integer_problems(400, 700, 300))
def test_sums_of_integers_are_exact(gpu: torch.device, kernel: str, arguments: dict) -> None:
    with forced(kernel):
        run_exactly(exact.make(**arguments, device=gpu))


# (out_features, in_features) of real models, and odd ones: edges of tiles, K that is no multiple of 64 or of 8.
REAL = ((4096, 4096), (8192, 8192), (28672, 8192), (8192, 28672), (11008, 4096), (128256, 2048), (1024, 4096))
ODD = ((4099, 4096), (4096, 4064), (4097, 4099), (65, 8192), (8200, 4160), (24, 28672))
ROWS = (1, 2, 5, 8, 9, 16, 17, 64, 100, 256, 257, 1000)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
@pytest.mark.parametrize("n, k", [*REAL, *ODD])
def test_real_and_odd_shapes_are_exact(gpu: torch.device, n: int, k: int, grad: bool) -> None:
    for number, m in enumerate(ROWS):
        dtype = HALVES[number % 4 == 3]
        run_exactly(exact.make(n, k, m, dtype=dtype, bias=True, rank=16 * (number % 2), grad=grad, seed=m, device=gpu))


@pytest.mark.parametrize("kernel", FASTER)
@pytest.mark.parametrize("n, k", [(4096, 4096), (8192, 8192), (4099, 4096), (4096, 4064)])
def test_every_kernel_is_exact_at_real_sizes(gpu: torch.device, kernel: str, n: int, k: int) -> None:
    dtypes = (torch.float32,) if kernel == "linear_fp32" else HALVES
    for dtype, int8, grad, m in itertools.product(dtypes, (False, True), (False, True), (1, 16, 48, 300, 2048)):
        if kernel == "linear_fp32" and m > 300:
            continue
        problem = exact.make(n, k, m, int8=int8, dtype=dtype, rank=16, bias=True, grad=grad, seed=m, device=gpu)
        with forced(kernel):
            if explained(problem)["kernel"] == kernel:
                run_exactly(problem)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
def test_random_numbers_at_real_sizes(gpu: torch.device, format: str, grad: bool) -> None:
    # Rounding errors are independent of each other here: their norm, beside the norm of what is added up, is far below
    # the bound of a single sum: u of the output and of the weight, with a factor of 2 for all else.
    weight = make(4096, 4096, 1, format).weight
    for dtype, m in itertools.product(HALVES, (1, 16, 64, 512)):
        x = values("normal", m, 4096, dtype=dtype, seed=m)
        problem = moved(Problem(x, weight, grad=grad), gpu)
        actual = problem.run().double()
        right = problem.weight.dequantize(torch.float32).double()
        answer = problem.x.double() @ (right if grad else right.t())
        unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        assert (actual - answer).norm() <= 2 * unit * answer.norm(), (dtype, m)


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_input_change_no_bit(gpu: torch.device, layout: str, m: int) -> None:
    for dtype, grad in itertools.product((*HALVES, torch.float32), (False, True)):
        problem = moved(make(136, 192, m, dtype=dtype, rank=5, layout=layout, grad=grad), gpu)
        strided = problem.run()
        kernel = explained(problem)["kernel"]
        problem.x = problem.x.contiguous()
        # Unaligned rows take another kernel, whose sums run in another order.
        assert_within_bound(problem, strided)
        if layout in ("leading", "transposed", "column_stride"):  # which are copied first
            assert torch.equal(strided, problem.run()), kernel


@pytest.mark.parametrize("kernel", FASTER)
def test_the_same_arguments_give_the_same_bits(gpu: torch.device, kernel: str) -> None:
    dtype = torch.float32 if kernel == "linear_fp32" else torch.bfloat16
    with forced(kernel):
        for m, grad in itertools.product((1, 16, 64, 256), (False, True)):
            problem = moved(make(1024, 4096, m, dtype=dtype, rank=16, bias=dtype, grad=grad), gpu)
            first = problem.run()
            for _ in range(10):
                torch.full((1 << 20,), float("nan"), device=gpu)
                assert torch.equal(first, problem.run()), (m, grad)


def test_counters_of_the_workspace_are_zero_after_every_kernel(gpu: torch.device) -> None:
    for m, grad, (n, k) in itertools.product(
        (1, 8, 16, 40, 200), (False, True), ((512, 4096), (4096, 512), (65, 1000))
    ):
        exact.make(n, k, m, rank=16, grad=grad, device=gpu).run()
    torch.cuda.synchronize()
    for memory in cuda._workspaces.values():
        assert not bool(memory[: 4 * cuda.core().COUNTERS].any())


@pytest.mark.parametrize("m", [0, 1, 17])
def test_nothing_times_nothing(gpu: torch.device, m: int) -> None:
    for n, k, grad in ((0, 64, False), (5, 0, False), (0, 64, True), (5, 0, True), (0, 0, False)):
        for dtype in (torch.bfloat16, torch.float32):
            problem = moved(make(n, k, m, dtype=dtype, bias=dtype, rank=2, grad=grad), gpu)
            assert_within_bound(problem, problem.run())


@pytest.mark.parametrize("m", [1, 16, 17, 64, 300])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
def test_not_a_number_stays_in_its_row(gpu: torch.device, m: int, grad: bool) -> None:
    for dtype in (*HALVES, torch.float32):
        problem = moved(make(128, 256, m, dtype=dtype, grad=grad), gpu)
        problem.x[m - 1, 3] = float("nan")
        result = problem.run()
        assert bool(result[m - 1].isnan().all())
        assert not bool(result[: m - 1].isnan().any())


@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_a_side_path_of_zeros_changes_no_bit(gpu: torch.device, m: int) -> None:
    for dtype, grad in itertools.product(HALVES, (False, True)):
        problem = moved(make(256, 512, m, dtype=dtype, rank=16, grad=grad, side=dtype, side_weight=dtype), gpu)
        with forced("linear_wgmma" if m > 16 or grad else ""):
            problem.side_weight = torch.zeros_like(problem.side_weight)
            beside = problem.run()
            problem.side = problem.side_weight = None
            assert torch.equal(beside, problem.run())


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_int8_activations_are_those_of_the_specification(gpu: torch.device, format: str) -> None:
    for m, (n, k) in itertools.product((3, 17, 200), ((256, 512), (129, 1000))):
        problem = moved(make(n, k, m, format, dtype=torch.bfloat16, bias=torch.bfloat16), gpu)
        weight = problem.packed._replace(compute=1)
        actual = cuda.linear(problem.x, weight, problem.bias, None, None).double()
        dense = problem.weight.dequantize(torch.float32)
        right = reference.linear_int8_activations(problem.x.float(), dense, problem.bias.float()).double()
        plain = problem.x.double() @ dense.double().t() + problem.bias.double()
        # A row of x is rounded by up to 1/254 of its largest element, the weight (4 bits) once more; both errors are
        # independent over k. The result can be no further from the specification than both are from the unrounded sum.
        error, allowed = (actual - right).norm(), (right - plain).norm()
        assert error <= (2.0**-8 * right.norm() if format == "int8" else allowed + 2.0**-8 * right.norm())
        assert (actual - plain).norm() <= 2 * allowed + 2.0**-7 * plain.norm()


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
def test_weights_of_more_than_two_to_the_31_elements(gpu: torch.device, grad: bool) -> None:
    n, k = 65_664, 32_768
    assert n * k > 2**31
    if torch.cuda.mem_get_info(gpu)[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    for m in (1, 33):
        run_exactly(exact.make(n, k, m, grad=grad, rank=8, seed=m, device=gpu))
    torch.cuda.empty_cache()
