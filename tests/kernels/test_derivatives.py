"""Second derivatives, torch.func, forward mode, and inputs whose memory is not what they show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels.problems import DTYPES, decoded, make, quantized
from torch import Tensor

from nybble import QuantConfig, ops

N, K, M, R = 6, 10, 4, 3
SCALING = 2.0
TENSOR = quantized(N, K, QuantConfig())
WEIGHT = TENSOR.packed_weight()
DENSE = decoded(TENSOR).double()


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]


def assert_same_second_derivatives(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], *shapes: tuple[int, ...]
) -> None:
    """Gradients of a function of the gradients of both, fp32 against float64; a relative 1e-4 is far above rounding."""
    results = []
    for call, dtype in ((ours, torch.float32), (plain, torch.float64)):
        values = [v.detach().to(dtype).requires_grad_() for v in leaves(*shapes)]
        first = torch.autograd.grad(call(*values).square().sum(), values, create_graph=True)
        size = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(size, values))
    for one, other in zip(*results, strict=True):
        assert (one.double() - other).norm() <= 1e-4 * other.norm()


def test_second_derivatives_of_linear() -> None:
    assert_same_second_derivatives(
        lambda x, bias, side, side_weight: ops.linear(x, WEIGHT, bias, side, side_weight),
        lambda x, bias, side, side_weight: x @ DENSE.t() + side @ side_weight.t() + bias,
        (M, K),
        (N,),
        (M, R),
        (N, R),
    )


@pytest.mark.parametrize("registered", [False, True], ids=["function", "operator"])
def test_second_derivatives_of_lora_linear(registered: bool) -> None:
    def operator(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if registered:
            return torch.ops.nybble.lora_linear(x, *WEIGHT, bias, a, b, SCALING)[0]
        return ops.lora_linear(x, WEIGHT, bias, a, b, SCALING)

    assert_same_second_derivatives(
        operator,
        lambda x, bias, a, b: x @ DENSE.t() + SCALING * (x @ a.t()) @ b.t() + bias,
        (M, K),
        (N,),
        (R, K),
        (N, R),
    )


def test_second_derivatives_of_grad_input() -> None:
    assert_same_second_derivatives(
        lambda g, side, side_weight: ops.grad_input(g, WEIGHT, side, side_weight),
        lambda g, side, side_weight: g @ DENSE + side @ side_weight,
        (M, N),
        (M, R),
        (R, K),
    )


def test_functorch_gradients_are_those_of_autograd() -> None:
    x, a, b = leaves((M, K), (R, K), (N, R))

    def loss(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.linear(ops.lora_linear(x, WEIGHT, None, a, b, SCALING).repeat(1, 2)[:, :K], WEIGHT).square().sum()

    expected = torch.autograd.grad(loss(x, a, b), (x, a, b))
    actual = torch.func.grad(loss, argnums=(0, 1, 2))(x.detach(), a.detach(), b.detach())
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch warns of itself at the first use of jvp
def test_forward_mode_and_vmap_are_refused_not_wrong() -> None:
    x = torch.randn(M, K)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: ops.linear(x, WEIGHT), (x,), (x,))
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.vmap(lambda x: ops.linear(x, WEIGHT))(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lazily_negated_input_is_negated(dtype: torch.dtype) -> None:
    x = torch.randn(M, K).to(dtype)
    lazy = torch._neg_view(x)
    assert lazy.is_neg()
    assert torch.equal(ops.linear(lazy, WEIGHT), ops.linear(-x, WEIGHT))


def test_outputs_are_no_views_and_may_be_changed_in_place() -> None:
    (x,) = leaves((2, M, K))
    y = ops.linear(x, WEIGHT)
    assert not y._is_view()
    y.mul_(2.0)
    y.sum().backward()
    assert torch.equal(x.grad, ops.grad_input(torch.full((2, M, N), 2.0), WEIGHT))


def test_a_default_device_does_not_decide_where_results_are() -> None:
    problem = make(N, K, M, rank=R)
    expected = problem.run()
    with torch.device("meta"):
        result = problem.run()
    assert result.device.type == "cpu"
    assert torch.equal(result, expected)


def test_outputs_share_no_memory_with_each_other() -> None:
    x = torch.randn(M, K)
    first = ops.linear(x, WEIGHT)
    kept = first.clone()
    ops.linear(-x, WEIGHT)
    assert torch.equal(first, kept)
