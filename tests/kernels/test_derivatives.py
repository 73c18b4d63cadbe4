"""Second derivatives with respect to every argument, against float64 autograd; torch.func against autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels.problems import decoded, quantized
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


def test_outputs_share_no_memory_with_each_other() -> None:
    x = torch.randn(M, K)
    first = ops.linear(x, WEIGHT)
    kept = first.clone()
    ops.linear(-x, WEIGHT)
    assert torch.equal(first, kept)
