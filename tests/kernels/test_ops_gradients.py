"""Gradients of the operators, first and second, against those of the dequantized weight."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.ops_inputs import SCALING, WEIGHTS, K, M, N, R, differentiable, inputs, row_masks
from kernels.problems import DTYPES, UNIT, decoded, quantized
from torch import Tensor

from nybble import ops
from nybble.backends import PackedWeight


def assert_close(actual: Tensor, exact: Tensor, size: Tensor, terms: int, dtype: torch.dtype, roundings: int) -> None:
    """`actual` is within the error bound of chained products with `terms` terms in all, summed in fp32.

    On its way through, a term is rounded to `dtype` at most `roundings` times (factors that are cast, intermediate and
    final results): a factor (1 + u) each; the fp32 sums add gamma_terms, which 2 terms 2^-24 is above. `size` is the
    same expression of the magnitudes of all inputs.
    """
    bound = ((1 + UNIT[dtype]) ** roundings * (1 + 2 * terms * 2.0**-24) - 1) * size
    assert actual.shape == exact.shape
    assert bool(((actual.double() - exact).abs() <= bound).all()), (actual.double() - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", list(WEIGHTS))
def test_gradients_of_linear_are_those_of_the_dequantized_weight(isa: str, config: str, dtype: torch.dtype) -> None:
    weight = quantized(N, K, WEIGHTS[config])
    w = decoded(weight).double()
    t = inputs(dtype, rows=12)
    names = ("x", "bias", "side", "side_weight")
    leaves = differentiable(*(t[name] for name in names))
    y = ops.linear(leaves[0], weight.packed_weight(), *leaves[1:])
    actual = torch.autograd.grad(y, leaves, t["g"])

    def reference(values: list[Tensor], by: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        x, bias, side, side_weight = differentiable(*values)
        out = x @ by.t() + side @ side_weight.t() + bias
        return torch.autograd.grad(out, (x, bias, side, side_weight), g)

    double = [t[name].double() for name in names]
    exact = reference(double, w, t["g"].double())
    sizes = reference([v.abs() for v in double], w.abs(), t["g"].double().abs())
    for one, other, size in zip(actual, exact, sizes, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, size, terms=N + K + 12, dtype=dtype, roundings=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", list(WEIGHTS))
def test_gradients_of_lora_linear(isa: str, config: str, factors: torch.dtype, dtype: torch.dtype) -> None:
    weight = quantized(N, K, WEIGHTS[config])
    w = decoded(weight).double()
    t = inputs(dtype, rows=12)
    t["a"], t["b"] = t["a"].to(factors), t["b"].to(factors)
    names = ("x", "bias", "a", "b")
    leaves = differentiable(*(t[name] for name in names))
    y = ops.lora_linear(leaves[0], weight.packed_weight(), *leaves[1:], SCALING)
    actual = torch.autograd.grad(y, leaves, t["g"])

    def reference(values: list[Tensor], by: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        x, bias, a, b = differentiable(*values)
        out = x @ by.t() + SCALING * (x @ a.t()) @ b.t() + bias
        return torch.autograd.grad(out, (x, bias, a, b), g)

    double = [t[name].double() for name in names]
    exact = reference(double, w, t["g"].double())
    sizes = reference([v.abs() for v in double], w.abs(), t["g"].double().abs())
    coarse = max((dtype, factors), key=UNIT.__getitem__)
    for leaf, one, other, size in zip(leaves, actual, exact, sizes, strict=True):
        assert one.dtype == leaf.dtype
        assert_close(one, other, size, terms=N + K + R + 12, dtype=coarse, roundings=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", list(WEIGHTS))
@pytest.mark.parametrize("shape", [(12,), (12, 2), (2, 3, 5)], ids=str)
def test_a_mask_multiplies_the_side_path(isa: str, config: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = quantized(N, K, WEIGHTS[config])
    w = decoded(weight).double()
    t = inputs(torch.float32)
    x, g, mask = torch.randn(*shape, K).to(dtype), torch.randn(*shape, N).to(dtype), row_masks(shape[0], R)
    leaves = differentiable(x, t["bias"].to(dtype), t["a"], t["b"])
    y = ops.lora_linear(leaves[0], weight.packed_weight(), *leaves[1:], SCALING, mask)
    actual = [y, *torch.autograd.grad(y, leaves, g)]

    def reference(values: list[Tensor], by: Tensor, g: Tensor) -> list[Tensor]:
        x, bias, a, b = differentiable(*values)
        scale = SCALING * mask.double().reshape(shape[0], *(1,) * (len(shape) - 1), R)
        out = x @ by.t() + (x @ a.t() * scale) @ b.t() + bias
        return [out, *torch.autograd.grad(out, (x, bias, a, b), g)]

    double = [leaf.detach().double() for leaf in leaves]
    exact = reference(double, w, g.double())
    sizes = reference([v.abs() for v in double], w.abs(), g.double().abs())
    for one, other, size in zip(actual, exact, sizes, strict=True):
        assert_close(one, other, size, terms=N + K + R + 12, dtype=dtype, roundings=6)
    base = ops.linear(x, weight.packed_weight(), leaves[1].detach())
    assert torch.equal(y[0], base[0])  # a row whose mask is 0, bit for bit
    assert not torch.equal(y[1], base[1])


@pytest.mark.parametrize("registered", [False, True], ids=["function", "operator"])
def test_only_what_is_needed_gets_a_gradient(weight: PackedWeight, registered: bool) -> None:
    t = inputs()
    for needed in itertools.product((False, True), repeat=4):
        for name, keys in (
            ("linear", ("x", "bias", "side", "side_weight")),
            ("lora_linear", ("x", "bias", "a", "b")),
        ):
            full = differentiable(*(t[key] for key in keys))
            some = [t[key].clone().requires_grad_(need) for key, need in zip(keys, needed, strict=True)]
            tail = (SCALING,) if name == "lora_linear" else ()
            if registered:
                result = getattr(torch.ops.nybble, name)(some[0], *weight, *some[1:], *tail)
                result = result[0] if name == "lora_linear" else result
            else:
                result = getattr(ops, name)(some[0], weight, *some[1:], *tail)
            assert result.requires_grad == any(needed)
            if not any(needed):
                continue
            result.backward(t["g"])
            reference = torch.autograd.grad(getattr(ops, name)(full[0], weight, *full[1:], *tail), full, t["g"])
            for leaf, need, want in zip(some, needed, reference, strict=True):
                assert (leaf.grad is not None) == need
                assert leaf.grad is None or torch.equal(leaf.grad, want)


def test_the_gradient_of_grad_input_is_the_forward(weight: PackedWeight) -> None:
    t = inputs()
    g, side, side_weight = differentiable(t["g"], t["side"], t["a"])
    dx = torch.ops.nybble.grad_input(g, *weight, side, side_weight)
    gg = torch.randn(M, K)
    to_g, to_side, to_side_weight = torch.autograd.grad(dx, (g, side, side_weight), gg)
    assert torch.equal(to_g, ops.linear(gg, weight))
    torch.testing.assert_close(to_side, gg @ t["a"].t())
    torch.testing.assert_close(to_side_weight, t["side"].t() @ gg)


def test_double_backward_through_the_registered_operator(weight: PackedWeight) -> None:
    t = inputs()
    (x,) = differentiable(t["x"])
    (g,) = differentiable(t["g"])
    y = torch.ops.nybble.linear(x, *weight, None, None, None)
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    (back,) = torch.autograd.grad(dx.square().sum(), g)
    torch.testing.assert_close(back, ops.linear(2 * dx.detach(), weight))


def test_a_broadcast_gradient_is_taken_as_it_is(weight: PackedWeight) -> None:
    # sum over the batch, then a product: the gradient that arrives has stride 0 over the rows.
    t = inputs()
    (x,) = differentiable(t["x"])
    (ops.linear(x, weight).sum(0) * t["bias"]).sum().backward()
    assert torch.equal(x.grad, ops.grad_input(t["bias"].repeat(M, 1), weight))
