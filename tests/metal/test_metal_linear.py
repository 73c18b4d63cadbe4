"""Linear kernels of Metal's against float64, within derived bounds, under every order of their threads."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from bounds import assert_within_bound, rounds_weight
from hypothesis import given
from hypothesis import strategies as st
from problems import DTYPES, FORMATS, Problem, make, problems
from shim.metal.library import ORDERS, Schedule

from nybble import ops, reference


def check(mps: ModuleType, problem: Problem) -> None:
    if problem.grad:
        actual = mps.grad_input(problem.x, problem.packed, problem.side, problem.side_weight)
    else:
        actual = mps.linear(problem.x, problem.packed, problem.bias, problem.side, problem.side_weight)
    assert_within_bound(problem, actual, rounds_weight(mps, problem))


@given(problem=problems(), order=st.sampled_from(sorted(ORDERS)), flush=st.booleans(), seed=st.integers(0, 2**32))
def test_any_problem(mps: ModuleType, schedule: Schedule, problem: Problem, order: str, flush: bool, seed: int) -> None:
    schedule.order, schedule.flush, schedule.seed = order, flush, seed
    check(mps, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
def test_few_rows_of_several_steps(mps: ModuleType, m: int, format: str, dtype: torch.dtype) -> None:
    # A step of 32 lanes takes 1024 elements of a row at most; the last one is partial, as rows and threadgroups are.
    check(mps, make(13, 2080, m, format, 64, dtype=dtype, bias=torch.bfloat16, rank=40, seed=m))


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("m", [9, 32, 33, 70])
def test_tiles_of_several_steps(mps: ModuleType, m: int, format: str, dtype: torch.dtype, grad: bool) -> None:
    # 144 is whole runs of 16, 4 steps of 32 and a half; 100 is not, of either side.
    for n, k in ((144, 144), (100, 144), (144, 100)):
        check(mps, make(n, k, m, format, 128, dtype=dtype, bias=torch.float32, rank=17, grad=grad, seed=m))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("m", [1, 20])
def test_every_format(mps: ModuleType, m: int, format: object) -> None:
    check(mps, make(40, 96, m, format, 32, dtype=torch.bfloat16))
    check(mps, make(40, 96, m, format, 4096, dtype=torch.bfloat16, grad=True))


def test_kernels_that_ran_are_those_that_explain_names(mps: ModuleType, schedule: Schedule) -> None:
    for grad in (False, True):
        for m in (1, 2, 7, 8, 9, 32, 33, 65):
            problem = make(16, 32, m, grad=grad)
            schedule.launches.clear()
            check(mps, problem)
            named = mps.explain_linear(16, 32, m, torch.float32, False, grad)
            assert [launch.startswith(named["kernel"]) for launch in schedule.launches] == [True]


def test_same_bits_in_every_order(mps: ModuleType, schedule: Schedule) -> None:
    for m, grad in ((3, False), (40, False), (40, True)):
        problem, results = make(70, 96, m, dtype=torch.float16, rank=9, grad=grad), []
        for schedule.order in ORDERS:
            results.append(
                (mps.grad_input if grad else lambda *a: mps.linear(*a[:2], None, *a[2:]))(
                    problem.x, problem.packed, problem.side, problem.side_weight
                )
            )
        assert all(torch.equal(result, results[0]) for result in results)


@given(problem=problems(grad=False), threshold=st.sampled_from((0.0, 0.5, 3.0)))
def test_int8_activations(mps: ModuleType, problem: Problem, threshold: float) -> None:
    packed = problem.packed._replace(compute=1, outlier_threshold=threshold)
    weight = problem.weight.dequantize(torch.float32)
    rest = (problem.bias, problem.side, problem.side_weight)
    actual = mps.linear(problem.x, packed, *rest)
    # Rounded rows are exact integers times a scale; what follows is the fp32 kernel.
    values = mps._rounded_rows(problem.x, threshold)
    wanted = Problem(values, problem.weight, *rest)
    fp32 = mps.linear(values, problem.packed, *rest)
    assert torch.equal(actual, fp32.to(problem.x.dtype))
    if bool(values.isfinite().all()) and values.numel():
        assert_within_bound(wanted, fp32, False)
        ones = torch.eye(problem.x.shape[-1])
        said = reference.linear_int8_activations(problem.x.float(), ones, outlier_threshold=threshold)
        assert torch.allclose(values, said, rtol=1e-6, atol=2.0**-126)
    assert actual.shape == (*problem.x.shape[:-1], weight.shape[0])


def test_operations_and_their_gradients_run_the_kernels(on_shim: ModuleType, schedule: Schedule) -> None:
    problem = make(48, 64, 12, dtype=torch.float32, rank=4)
    x, side, side_weight = (t.clone().requires_grad_() for t in (problem.x, problem.side, problem.side_weight))
    schedule.launches.clear()
    y = ops.linear(x, problem.packed, None, side, side_weight)
    g = torch.randn(y.shape)
    y.backward(g)
    assert [name.rsplit("_", 3)[0] for name in schedule.launches] == ["linear_tiles", "grad_input_tiles"]
    weight = problem.weight.dequantize(torch.float32)
    assert torch.allclose(y, x @ weight.t() + side @ side_weight.t(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(x.grad, g @ weight, rtol=1e-5, atol=1e-5)
    assert torch.allclose(side.grad, g @ side_weight, rtol=1e-5, atol=1e-5)
    assert torch.allclose(side_weight.grad, g.t() @ side, rtol=1e-5, atol=1e-5)
