"""What callers use, and the eager way to its gradients, first and second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import PackedWeight
from .bodies import factor_applied, grad_input_body, linear_body, lora_linear_body, side_factor
from .routes import PLAIN_CALL, TRACED, autocast, autocast_anywhere, path_of, transforms_active
from .side_gradients import bias_gradient, factor_gradient, product_gradient, times

# What `recomputation.saving_first` has lora_linear do where it is differentiated eagerly; None: what it does by itself.
differentiated_lora_linear: Callable[..., Tensor] | None = None


# ---- what callers use ------------------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    side: Tensor | None = None,
    side_weight: Tensor | None = None,
) -> Tensor:
    """x W^T + side side_weight^T + bias; differentiable in everything but the weight, which is frozen.

    Args:
        x: [..., in_features], fp32, fp16 or bf16; any strides.
        weight: the quantized weight [out_features, in_features]. Where weight.compute is 1, each row of x is rounded
            to int8 (`nybble.reference.linear_int8_activations`), but for the columns of x that reach
            weight.outlier_threshold, if that is above 0; gradients are those of the unrounded product.
        bias: [out_features].
        side: [..., R], goes together with side_weight: [out_features, R].

    Returns:
        [..., out_features] in x's dtype (under autocast: in autocast's).

    Raises:
        LayoutError: shapes do not fit. UnsupportedDtypeError: a dtype that is not supported.
    """
    path = path_of(x, weight, bias, side, side_weight)
    if path == TRACED or autocast_anywhere():
        x, side = autocast(x, side)
    if path == PLAIN_CALL:
        return linear_body(x, weight, bias, side, side_weight)
    if path == TRACED:
        return torch.ops.nybble.linear(x, *weight, bias, side, side_weight)
    return _apply(_Linear, x, weight, bias, side, side_weight)


def lora_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """x W^T + scaling (x A^T * mask) B^T + bias; differentiable in everything but the weight and the mask.

    With the factors of several adapters beside each other and a mask that holds, for each row of the batch, its own
    adapter's scaling in that adapter's columns and 0 elsewhere, a batch mixes adapters. A row whose mask is 0 gets what
    it gets without the update, bit for bit, as long as the factors are finite.

    Args:
        x: [..., in_features], fp32, fp16 or bf16. bias: [out_features].
        lora_a: [R, in_features]. lora_b: [out_features, R]; of any of the three dtypes, used in x's.
        mask: [x.shape[0], R], the same for all dimensions of x between the first and the last; a constant.

    Returns:
        [..., out_features] in x's dtype (under autocast: in autocast's).
    """
    path = path_of(x, weight, bias, lora_a, lora_b, mask)
    if path == TRACED or autocast_anywhere():
        (x,) = autocast(x)
    if path == PLAIN_CALL:
        return lora_linear_body(x, weight, bias, lora_a, lora_b, scaling, mask)[0]
    if path == TRACED:
        return torch.ops.nybble.lora_linear(x, *weight, bias, lora_a, lora_b, scaling, mask)[0]
    if differentiated_lora_linear is not None and not transforms_active():
        return differentiated_lora_linear(x, weight, bias, lora_a, lora_b, scaling, mask)
    return _apply(_LoRALinear, x, weight, bias, lora_a, lora_b, scaling, mask)[0]


def grad_input(
    g: Tensor, weight: PackedWeight, side: Tensor | None = None, side_weight: Tensor | None = None
) -> Tensor:
    """g W + side side_weight: the gradient with respect to x. g [..., out_features], side_weight [R, in_features]."""
    path = path_of(g, weight, side, side_weight)
    if path == PLAIN_CALL:
        return grad_input_body(g, weight, side, side_weight)
    if path == TRACED:
        return torch.ops.nybble.grad_input(g, *weight, side, side_weight)
    return _apply(_GradInput, g, weight, side, side_weight)


# ---- gradients -------------------------------------------------------------------------------------------------------


def lora_gradients(
    needs: tuple[bool, bool, bool, bool],
    g: Tensor,
    weight: PackedWeight,
    saved: tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor | None],
    scaling: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of lora_linear with respect to x, bias, A and B, each None if it is not needed."""
    need_x, need_bias, need_a, need_b = needs
    bias, x, side, lora_a, lora_b, mask = saved
    if torch.is_grad_enabled():
        # Differentiated once more: the saved product is a constant, so it is computed again from x and A.
        side = side_factor(x, lora_a, scaling, mask)
    left = factor_applied(g, lora_b, False, scaling, mask)
    return (
        grad_input(g, weight, left, lora_a) if need_x else None,
        bias_gradient(g, bias) if need_bias and bias is not None else None,
        factor_gradient(left, x, True, lora_a) if need_a else None,
        factor_gradient(side, g, False, lora_b) if need_b else None,
    )


def grad_input_gradients(
    needs: tuple[bool, bool, bool], gg: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of grad_input with respect to g, side and side_weight, each None if it is not needed."""
    need_g, need_side, need_side_weight = needs
    dside = dside_weight = None
    if side is not None and side_weight is not None:
        dside = times(gg, side_weight.to(gg.dtype).t()).to(side.dtype) if need_side else None
        dside_weight = product_gradient(side.to(gg.dtype), gg, side_weight) if need_side_weight else None
    return linear(gg, weight) if need_g else None, dside, dside_weight


# ---- eager with gradient ---------------------------------------------------------------------------------------------


def _apply(function: Any, *args: Any) -> Any:
    """function.apply(*args). Without torch.func, 4 us less than what torch does for the sake of it."""
    if transforms_active():
        return function.apply(*args)
    return _EAGER[function](*[_unwrap(a) if isinstance(a, Tensor) else a for a in args])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: PackedWeight, bias: Tensor | None, side: Tensor | None, side_weight: Tensor | None
    ) -> Tensor:
        return linear_body(x, weight, bias, side, side_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.weight, bias, side, side_weight = inputs
        ctx.save_for_backward(bias, side, side_weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        bias, side, side_weight = ctx.saved_tensors
        need_x, _, need_bias, need_side, need_side_weight = ctx.needs_input_grad
        return (
            grad_input(g, ctx.weight) if need_x else None,
            None,
            bias_gradient(g, bias) if need_bias else None,
            times(g, side_weight.to(g.dtype)).to(side.dtype) if need_side else None,
            product_gradient(g, side, side_weight) if need_side_weight else None,
        )


class _GradInput(torch.autograd.Function):
    """For second derivatives: dx = g W + side A is linear in g, so its gradient is the forward contraction again."""

    @staticmethod
    def forward(g: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None) -> Tensor:
        return grad_input_body(g, weight, side, side_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.weight, side, side_weight = inputs
        ctx.save_for_backward(side, side_weight)

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
        need_g, _, need_side, need_side_weight = ctx.needs_input_grad
        needs = (need_g, need_side, need_side_weight)
        dg, dside, dside_weight = grad_input_gradients(needs, gg, ctx.weight, *ctx.saved_tensors)
        return dg, None, dside, dside_weight


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return lora_linear_body(x, weight, bias, lora_a, lora_b, scaling, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.weight, bias, lora_a, lora_b, ctx.scaling, mask = inputs
        ctx.save_for_backward(bias, x, output[1], lora_a, lora_b, mask)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        need_x, _, need_bias, need_a, need_b, _, _ = ctx.needs_input_grad
        needs = (need_x, need_bias, need_a, need_b)
        dx, dbias, da, db = lora_gradients(needs, g, ctx.weight, ctx.saved_tensors, ctx.scaling)
        return dx, None, dbias, da, db, None, None


def _eager(function: Any) -> Any:
    """What applies `function` in plain reverse mode, its forward and setup_context in one.

    torch inspects the signature of a forward that has a setup_context of its own in every call (17 of 23 us, measured),
    which only torch.func needs.
    """

    class Eager(function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = function.forward(*args)
            function.setup_context(ctx, args, output)
            return output

        setup_context = staticmethod(torch.autograd.Function.setup_context)

    Eager.__name__ = function.__name__
    apply: Any = torch._C._FunctionBase.__dict__["apply"]  # under Function.apply, which only unwraps the arguments
    return apply.__get__(None, Eager)


_unwrap = torch._C._functorch.unwrap_if_dead
_EAGER = {function: _eager(function) for function in (_Linear, _GradInput, _LoRALinear)}
