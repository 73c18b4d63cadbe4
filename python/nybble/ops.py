"""The operations on quantized weights: one implementation behind an eager path, an autograd.Function and torch.library.

    linear(x, weight, bias, side, side_weight)      y  = x W^T + side side_weight^T + bias
    lora_linear(x, weight, bias, A, B, scaling)     y  = x W^T + (scaling x A^T) B^T + bias
    lora_linear(..., mask)                          y  = x W^T + (scaling x A^T * mask) B^T + bias
    grad_input(g, weight, side, side_weight)        dx = g W   + side side_weight

LoRA (arXiv 2106.09685) is an extension of the contraction, [x, s x A^T] [W, B]^T forward and [g, s g B] [W; A]
backward, so the kernel adds it in the same pass over the output. Several adapters in one batch are a wider A and B,
with each row of x masked to the columns of its own.

Eager calls take the plain body (no gradient) or one autograd.Function (gradient, torch.func.grad); tracing, dispatch
modes and tensor subclasses go through the registered operators `torch.ops.nybble.*`, whose dispatch costs several times
as much. Under autocast inputs are cast to its dtype, as for nn.Linear. Second derivatives are right; forward-mode
differentiation and vmap are refused by torch with an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .backends import BoundWeight, PackedWeight, factors
from .backends.products import product
from .backends.weight import PLAIN
from .errors import LayoutError, UnsupportedDtypeError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

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
    route = _route(x, weight, bias, side, side_weight)
    if route == _TRACED or _autocast_anywhere():
        x, side = _autocast(x, side)
    if route == _PLAIN:
        return _linear(x, weight, bias, side, side_weight)
    if route == _TRACED:
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
    route = _route(x, weight, bias, lora_a, lora_b, mask)
    if route == _TRACED or _autocast_anywhere():
        (x,) = _autocast(x)
    if route == _PLAIN:
        return _lora_linear(x, weight, bias, lora_a, lora_b, scaling, mask)[0]
    if route == _TRACED:
        return torch.ops.nybble.lora_linear(x, *weight, bias, lora_a, lora_b, scaling, mask)[0]
    if differentiated_lora_linear is not None and not _transforms_active():
        return differentiated_lora_linear(x, weight, bias, lora_a, lora_b, scaling, mask)
    return _apply(_LoRALinear, x, weight, bias, lora_a, lora_b, scaling, mask)[0]


def grad_input(
    g: Tensor, weight: PackedWeight, side: Tensor | None = None, side_weight: Tensor | None = None
) -> Tensor:
    """g W + side side_weight: the gradient with respect to x. g [..., out_features], side_weight [R, in_features]."""
    route = _route(g, weight, side, side_weight)
    if route == _PLAIN:
        return _grad_input(g, weight, side, side_weight)
    if route == _TRACED:
        return torch.ops.nybble.grad_input(g, *weight, side, side_weight)
    return _apply(_GradInput, g, weight, side, side_weight)


# ---- the shared bodies -----------------------------------------------------------------------------------------------


def check_args(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, side: Tensor | None, side_weight: Tensor | None, grad: bool
) -> None:
    """The one place that validates what reaches a kernel; raises LayoutError or UnsupportedDtypeError.

    `grad` tells the direction: x is [..., out_features] and side_weight [R, in_features].
    """
    contraction, columns = weight.in_features, weight.out_features
    if grad:
        contraction, columns = columns, contraction
    shape = x.shape
    if x.dtype not in _FLOATS:
        name = "grad" if grad else "x"
        raise UnsupportedDtypeError(f"{name} has dtype {x.dtype}; allowed are float32, float16, bfloat16")
    if not shape or shape[-1] != contraction:
        name, features = ("grad", "out_features") if grad else ("x", "in_features")
        raise LayoutError(f"{name} has shape {list(shape)}; its last dimension must be {features} = {contraction}")
    if not (
        isinstance(weight, BoundWeight) and (x.is_cpu or x.is_cuda)
    ):  # else its handle tells whether it still holds
        weight.check()
    if not (weight.packed.is_cpu and x.is_cpu):
        _check_device(weight.packed, x, "packed")
    if bias is not None:
        _check_operand("bias", bias, x, (columns,))
    if (side is None) != (side_weight is None):
        raise LayoutError("side and side_weight go together: one of them is None")
    if side is not None and side_weight is not None:
        rank = side.shape[-1] if side.dim() else 0
        _check_operand("side", side, x, (*x.shape[:-1], rank))
        _check_operand("side_weight", side_weight, x, (rank, columns) if grad else (columns, rank))


def _check_operand(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in _FLOATS:
        raise UnsupportedDtypeError(f"{name} has dtype {tensor.dtype}; allowed are float32, float16, bfloat16")
    if tensor.shape != shape:
        raise LayoutError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
    if not (tensor.is_cpu and x.is_cpu):
        _check_device(tensor, x, name)


def _check_device(tensor: Tensor, x: Tensor, name: str) -> None:
    if tensor.device != x.device:
        raise LayoutError(f"{name} is on {tensor.device}, but the input is on {x.device}; move one of them")


def _flat(x: Tensor) -> Tensor:
    """[..., k] as [m, k]; the number of rows is said, because -1 is ambiguous where k is 0."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, side: Tensor | None, side_weight: Tensor | None
) -> Tensor:
    check_args(x, weight, bias, side, side_weight, False)
    return backends.of(x).linear(x, weight, bias, side, side_weight)


def _grad_input(g: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None) -> Tensor:
    check_args(g, weight, None, side, side_weight, True)
    return backends.of(g).grad_input(g, weight, side, side_weight)


def check_lora(x: Tensor, weight: PackedWeight, lora_a: Tensor, lora_b: Tensor, mask: Tensor | None) -> None:
    """Before x A^T is computed, what `check_args` says only of its result; x itself first."""
    if x.dim() == 0 or x.shape[-1] != weight.in_features or x.dtype not in _FLOATS:
        check_args(x, weight, None, None, None, False)
    if lora_a.dim() != 2:
        raise LayoutError(f"lora_A has shape {list(lora_a.shape)}; it must be [r, in_features = {weight.in_features}]")
    rank = lora_a.shape[0]
    _check_operand("lora_A", lora_a, x, (rank, weight.in_features))
    _check_operand("lora_B", lora_b, x, (weight.out_features, rank))
    if mask is not None:
        if x.dim() < 2:
            raise LayoutError(f"x has shape {list(x.shape)}; with a mask it needs a first dimension of rows")
        _check_operand("mask", mask, x, (x.shape[0], rank))


def _lora_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the side path's left factor scaling x A^T [..., R], which the backward wants again."""
    check_lora(x, weight, lora_a, lora_b, mask)
    if torch.is_grad_enabled():
        x, lora_a = x.detach(), lora_a.detach()
    side = side_factor(x, lora_a, scaling, mask)
    return _linear(x, weight, bias, side, lora_b), side


def side_factor(x: Tensor, lora_a: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """scaling x A^T * mask in x's dtype; for fp16, whose range the product may leave, in fp32."""
    return _applied(x, lora_a, True, scaling, mask)


def _applied(x: Tensor, factor: Tensor, by_rank: bool, scaling: float, mask: Tensor | None) -> Tensor:
    """scaling x factor^T * mask in x's dtype, for fp16 in fp32; factor [R, n] (`by_rank`, LoRA's A) or [n, R] (B)."""
    rank = factor.shape[0 if by_rank else 1]
    rows, shape = _flat(x), (*x.shape[:-1], rank)
    if mask is None and factors.fits(rows, rank) and not (torch.is_grad_enabled() and factor.requires_grad):
        return factors.apply(rows, factor, scaling, by_rank).view(shape)
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    factor = _cast(factor, dtype)
    return scaled(product(_cast(rows, dtype), factor.t() if by_rank else factor).view(shape), scaling, mask)


def scaled(x: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """x [..., R] * scaling * mask in x's dtype, rounded once."""
    if mask is None:
        return x * scaling
    return _cast(x * spread(mask * scaling, x), x.dtype)


def spread(rows: Tensor, like: Tensor) -> Tensor:
    """Values [B, n] for every row of the batch, shaped so that they multiply `like` [B, ..., n]."""
    return rows if like.dim() == 2 else rows.view(rows.shape[0], *(1,) * (like.dim() - 2), rows.shape[1])


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # 0.7 us of `to` for nothing


def _bias_gradient(g: Tensor, bias: Tensor) -> Tensor:
    return _flat(g).sum(0, dtype=torch.float32).to(bias.dtype)


def _product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """left^T right over all rows, in the dtype of the parameter whose gradient it is."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    return product(_flat(left).to(dtype).t(), _flat(right).to(dtype), like.dtype)


def _factor_gradient(side: Tensor, x: Tensor, by_rank: bool, like: Tensor) -> Tensor:
    """side^T x of all rows, the gradient of LoRA's A (`by_rank`), or x^T side, that of B; in the parameter's dtype."""
    left, rows, rank = _flat(side), _flat(x), side.shape[-1]
    if rank <= factors.MOST_GRADIENT_RANK and factors.fits(left, rank) and factors.fits(rows, rank):
        return _cast(factors.gradient(left, rows, by_rank), like.dtype)
    return _product(side, x, like) if by_rank else _product(x, side, like)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., k] . matrix [k, n]"""
    return product(_flat(x), matrix).view(*x.shape[:-1], matrix.shape[1])


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
    left = _applied(g, lora_b, False, scaling, mask)
    return (
        grad_input(g, weight, left, lora_a) if need_x else None,
        _bias_gradient(g, bias) if need_bias and bias is not None else None,
        _factor_gradient(left, x, True, lora_a) if need_a else None,
        _factor_gradient(side, g, False, lora_b) if need_b else None,
    )


def _grad_input_gradients(
    needs: tuple[bool, bool, bool], gg: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of grad_input with respect to g, side and side_weight, each None if it is not needed."""
    need_g, need_side, need_side_weight = needs
    dside = dside_weight = None
    if side is not None and side_weight is not None:
        dside = _times(gg, side_weight.to(gg.dtype).t()).to(side.dtype) if need_side else None
        dside_weight = _product(side.to(gg.dtype), gg, side_weight) if need_side_weight else None
    return linear(gg, weight) if need_g else None, dside, dside_weight


# ---- eager with gradient ---------------------------------------------------------------------------------------------


def _apply(function: Any, *args: Any) -> Any:
    """function.apply(*args). Without torch.func, 4 us less than what torch does for the sake of it."""
    if _transforms_active():
        return function.apply(*args)
    return _EAGER[function](*[_unwrap(a) if isinstance(a, Tensor) else a for a in args])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: PackedWeight, bias: Tensor | None, side: Tensor | None, side_weight: Tensor | None
    ) -> Tensor:
        return _linear(x, weight, bias, side, side_weight)

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
            _bias_gradient(g, bias) if need_bias else None,
            _times(g, side_weight.to(g.dtype)).to(side.dtype) if need_side else None,
            _product(g, side, side_weight) if need_side_weight else None,
        )


class _GradInput(torch.autograd.Function):
    """For second derivatives: dx = g W + side A is linear in g, so its gradient is the forward contraction again."""

    @staticmethod
    def forward(g: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None) -> Tensor:
        return _grad_input(g, weight, side, side_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.weight, side, side_weight = inputs
        ctx.save_for_backward(side, side_weight)

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
        need_g, _, need_side, need_side_weight = ctx.needs_input_grad
        needs = (need_g, need_side, need_side_weight)
        dg, dside, dside_weight = _grad_input_gradients(needs, gg, ctx.weight, *ctx.saved_tensors)
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
        return _lora_linear(x, weight, bias, lora_a, lora_b, scaling, mask)

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


# ---- registered operators --------------------------------------------------------------------------------------------

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor? codebook, Tensor? nested_absmax, Tensor? nested_map, Tensor? nested_offset, "
    "SymInt out_features, SymInt in_features, int block_size, int nested_block_size, int compute, "
    "float outlier_threshold"
)
_WEIGHT_ARGS = len(PackedWeight._fields)

_library = torch.library.Library("nybble", "DEF")
_library.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? side, Tensor? side_weight) -> Tensor")
_library.define(f"grad_input(Tensor grad, {_WEIGHT}, Tensor? side, Tensor? side_weight) -> Tensor")
_library.define(
    f"lora_linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, Tensor? mask=None) "
    "-> (Tensor, Tensor)"
)


def _split(args: tuple[Any, ...]) -> tuple[PackedWeight, tuple[Any, ...]]:
    return PackedWeight(*args[:_WEIGHT_ARGS]), args[_WEIGHT_ARGS:]


def _linear_impl(x: Tensor, *args: Any) -> Tensor:
    weight, rest = _split(args)
    return _linear(x, weight, *rest)


def _grad_input_impl(g: Tensor, *args: Any) -> Tensor:
    weight, rest = _split(args)
    return _grad_input(g, weight, *rest)


def _lora_linear_impl(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, (bias, lora_a, lora_b, scaling, *mask) = _split(args)
    return _lora_linear(x, weight, bias, lora_a, lora_b, scaling, *(mask or (None,)))


def _linear_fake(x: Tensor, *args: Any) -> Tensor:
    weight, rest = _split(args)
    bias, side, side_weight = rest
    check_args(x, weight, bias, side, side_weight, False)
    return x.new_empty(*x.shape[:-1], weight.out_features)


def _grad_input_fake(g: Tensor, *args: Any) -> Tensor:
    weight, rest = _split(args)
    side, side_weight = rest
    check_args(g, weight, None, side, side_weight, True)
    return g.new_empty(*g.shape[:-1], weight.in_features)


def _lora_linear_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, (bias, lora_a, lora_b, _, *mask) = _split(args)
    check_lora(x, weight, lora_a, lora_b, *(mask or (None,)))
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    side = x.new_empty(*x.shape[:-1], lora_a.shape[0], dtype=dtype)
    check_args(x, weight, bias, side, lora_b, False)
    return x.new_empty(*x.shape[:-1], weight.out_features), side


def _save_weight(ctx: Any, weight: PackedWeight, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*weight[:6], *tensors)
    ctx.sizes = weight[6:]


def _saved(ctx: Any) -> tuple[PackedWeight, tuple[Any, ...]]:
    return PackedWeight(*ctx.saved_tensors[:6], *ctx.sizes), ctx.saved_tensors[6:]


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, (bias, side, side_weight) = _split(inputs[1:])
    _save_weight(ctx, weight, bias, side, side_weight)


def _linear_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    weight, (bias, side, side_weight) = _saved(ctx)
    needs = ctx.needs_input_grad
    need_bias, need_side, need_side_weight = needs[1 + _WEIGHT_ARGS :]
    return (
        grad_input(g, weight) if needs[0] else None,
        *(None,) * _WEIGHT_ARGS,
        _bias_gradient(g, bias) if need_bias else None,
        _times(g, side_weight.to(g.dtype)).to(side.dtype) if need_side else None,
        _product(g, side, side_weight) if need_side_weight else None,
    )


def _grad_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, (side, side_weight) = _split(inputs[1:])
    _save_weight(ctx, weight, side, side_weight)


def _grad_input_backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
    weight, (side, side_weight) = _saved(ctx)
    needs = ctx.needs_input_grad
    need_side, need_side_weight = needs[1 + _WEIGHT_ARGS :]
    dg, dside, dside_weight = _grad_input_gradients(
        (needs[0], need_side, need_side_weight), gg, weight, side, side_weight
    )
    return dg, *(None,) * _WEIGHT_ARGS, dside, dside_weight


def _lora_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, (bias, lora_a, lora_b, scaling, *mask) = _split(inputs[1:])
    _save_weight(ctx, weight, bias, inputs[0], output[1], lora_a, lora_b, *(mask or (None,)))
    ctx.scaling = scaling
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _lora_linear_backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    weight, saved = _saved(ctx)
    needs = ctx.needs_input_grad
    if g is None:
        return (None,) * len(needs)
    need_bias, need_a, need_b, *constants = needs[1 + _WEIGHT_ARGS :]  # torch leaves out a mask that is not given
    dx, dbias, da, db = lora_gradients((needs[0], need_bias, need_a, need_b), g, weight, saved, ctx.scaling)
    return dx, *(None,) * _WEIGHT_ARGS, dbias, da, db, *(None for _ in constants)


for _name, _impl, _fake, _setup, _backward in (
    ("linear", _linear_impl, _linear_fake, _linear_setup, _linear_backward),
    ("grad_input", _grad_input_impl, _grad_input_fake, _grad_input_setup, _grad_input_backward),
    ("lora_linear", _lora_linear_impl, _lora_linear_fake, _lora_linear_setup, _lora_linear_backward),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nybble::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"nybble::{_name}", _backward, setup_context=_setup, lib=_library)


# ---- which path ------------------------------------------------------------------------------------------------------


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for this type of device; of one that has none, such as "meta", torch refuses to tell."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    device = "cpu" if x.is_cpu else x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return (x, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype in _FLOATS else t for t in (x, *others))


_PLAIN, _DIFFERENTIATED, _TRACED = 0, 1, 2

_autocast_anywhere = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active


def _route(x: Tensor, weight: PackedWeight, *others: Tensor | None) -> int:
    """Which path a call takes.

    _TRACED where somebody watches operators go by: a compiler, a tracer, a dispatch mode or a tensor subclass;
    _DIFFERENTIATED where autograd has to see the call: reverse mode, torch.func, or forward mode (which autograd then
    refuses); else _PLAIN.
    """
    if torch.compiler.is_compiling() or _dispatch_modes() > 0 or _tracing_state() is not None:
        return _TRACED
    if type(x) not in PLAIN or type(weight[0]) not in PLAIN:
        return _TRACED
    needs_grad = x.requires_grad
    for tensor in others:
        if tensor is not None:
            if type(tensor) not in PLAIN:
                return _TRACED
            needs_grad = needs_grad or tensor.requires_grad
    if (needs_grad and torch.is_grad_enabled()) or _transforms_active() or forward_ad._current_level >= 0:
        return _DIFFERENTIATED
    return _PLAIN
