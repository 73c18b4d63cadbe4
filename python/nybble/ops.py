"""The operations on quantized weights: one implementation behind an eager path, an autograd.Function and torch.library.

    linear(x, weight, bias, side, side_weight)      y  = x W^T + side side_weight^T + bias
    lora_linear(x, weight, bias, A, B, scaling)     y  = x W^T + (scaling x A^T) B^T + bias
    grad_input(g, weight, side, side_weight)        dx = g W   + side side_weight

LoRA (arXiv 2106.09685) is an extension of the contraction, [x, s x A^T] [W, B]^T forward and [g, s g B] [W; A]
backward, so the kernel adds it in the same pass over the output.

Eager calls take the plain body (no gradient) or one autograd.Function (gradient, torch.func.grad); tracing, dispatch
modes and tensor subclasses go through the registered operators `torch.ops.nybble.*`, whose dispatch costs several times
as much. Under autocast inputs are cast to its dtype, as for nn.Linear. Second derivatives are right; forward-mode
differentiation and vmap are refused by torch with an error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import backends
from .backends import PackedWeight
from .errors import LayoutError, UnsupportedDtypeError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


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
            to int8 (`nybble.reference.linear_int8_activations`); gradients are those of the unrounded product.
        bias: [out_features].
        side: [..., R], goes together with side_weight: [out_features, R].

    Returns:
        [..., out_features] in x's dtype (under autocast: in autocast's).

    Raises:
        LayoutError: shapes do not fit. UnsupportedDtypeError: a dtype that is not supported.
    """
    x, side = _autocast(x, side)
    if _traced(x, weight.packed, bias, side, side_weight):
        return torch.ops.nybble.linear(x, *weight, bias, side, side_weight)
    if _differentiated(x, bias, side, side_weight):
        return _Linear.apply(x, weight, bias, side, side_weight)
    return _linear(x, weight, bias, side, side_weight)


def lora_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """x W^T + scaling (x A^T) B^T + bias; differentiable in everything but the weight.

    Args:
        x: [..., in_features], fp32, fp16 or bf16. bias: [out_features].
        lora_a: [R, in_features]. lora_b: [out_features, R]; of any of the three dtypes, used in x's.

    Returns:
        [..., out_features] in x's dtype (under autocast: in autocast's).
    """
    (x,) = _autocast(x)
    if _traced(x, weight.packed, bias, lora_a, lora_b):
        return torch.ops.nybble.lora_linear(x, *weight, bias, lora_a, lora_b, scaling)[0]
    if _differentiated(x, bias, lora_a, lora_b):
        return _LoRALinear.apply(x, weight, bias, lora_a, lora_b, scaling)[0]
    return _lora_linear(x, weight, bias, lora_a, lora_b, scaling)[0]


def grad_input(
    g: Tensor, weight: PackedWeight, side: Tensor | None = None, side_weight: Tensor | None = None
) -> Tensor:
    """g W + side side_weight: the gradient with respect to x. g [..., out_features], side_weight [R, in_features]."""
    if _traced(g, weight.packed, side, side_weight):
        return torch.ops.nybble.grad_input(g, *weight, side, side_weight)
    if _differentiated(g, side, side_weight):
        return _GradInput.apply(g, weight, side, side_weight)
    return _grad_input(g, weight, side, side_weight)


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
    name, features = ("grad", "out_features") if grad else ("x", "in_features")
    if x.dtype not in _FLOATS:
        raise UnsupportedDtypeError(f"{name} has dtype {x.dtype}; allowed are float32, float16, bfloat16")
    if x.dim() == 0 or x.shape[-1] != contraction:
        raise LayoutError(f"{name} has shape {list(x.shape)}; its last dimension must be {features} = {contraction}")
    weight.check()
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
    if tuple(tensor.shape) != shape:
        raise LayoutError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
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


def _check_lora(x: Tensor, weight: PackedWeight, lora_a: Tensor, lora_b: Tensor) -> None:
    """Before x A^T is computed, what `check_args` says only of its result; x itself first."""
    if x.dim() == 0 or x.shape[-1] != weight.in_features or x.dtype not in _FLOATS:
        check_args(x, weight, None, None, None, False)
    if lora_a.dim() != 2:
        raise LayoutError(f"lora_A has shape {list(lora_a.shape)}; it must be [r, in_features = {weight.in_features}]")
    rank = lora_a.shape[0]
    _check_operand("lora_A", lora_a, x, (rank, weight.in_features))
    _check_operand("lora_B", lora_b, x, (weight.out_features, rank))


def _lora_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """y and the side path's left factor scaling x A^T [..., R], which the backward wants again."""
    _check_lora(x, weight, lora_a, lora_b)
    side = _side(x.detach(), lora_a.detach(), scaling)
    return _linear(x, weight, bias, side, lora_b), side


def _side(x: Tensor, lora_a: Tensor, scaling: float) -> Tensor:
    """scaling x A^T in x's dtype; for fp16, whose range the product may leave, in fp32."""
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return functional.linear(x.to(dtype), lora_a.to(dtype)) * scaling


def _bias_gradient(g: Tensor, bias: Tensor) -> Tensor:
    return _flat(g).sum(0, dtype=torch.float32).to(bias.dtype)


def _product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """left^T right over all rows, in the dtype of the parameter whose gradient it is."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    return (_flat(left).to(dtype).t() @ _flat(right).to(dtype)).to(like.dtype)


def _lora_gradients(
    needs: tuple[bool, bool, bool, bool],
    g: Tensor,
    weight: PackedWeight,
    saved: tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor],
    scaling: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of lora_linear with respect to x, bias, A and B, each None if it is not needed."""
    need_x, need_bias, need_a, need_b = needs
    bias, x, side, lora_a, lora_b = saved
    if torch.is_grad_enabled():
        # Differentiated once more: the saved product is a constant, so it is computed again from x and A.
        side = _side(x, lora_a, scaling)
    left = (g @ lora_b.to(g.dtype)) * scaling
    return (
        grad_input(g, weight, left, lora_a) if need_x else None,
        _bias_gradient(g, bias) if need_bias and bias is not None else None,
        _product(left, x, lora_a) if need_a else None,
        _product(g, side, lora_b) if need_b else None,
    )


def _grad_input_gradients(
    needs: tuple[bool, bool, bool], gg: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of grad_input with respect to g, side and side_weight, each None if it is not needed."""
    need_g, need_side, need_side_weight = needs
    dside = dside_weight = None
    if side is not None and side_weight is not None:
        dside = (gg @ side_weight.to(gg.dtype).t()).to(side.dtype) if need_side else None
        dside_weight = _product(side.to(gg.dtype), gg, side_weight) if need_side_weight else None
    return linear(gg, weight) if need_g else None, dside, dside_weight


# ---- eager with gradient ---------------------------------------------------------------------------------------------


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
            (g @ side_weight.to(g.dtype)).to(side.dtype) if need_side else None,
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
        x: Tensor, weight: PackedWeight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        return _lora_linear(x, weight, bias, lora_a, lora_b, scaling)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.weight, bias, lora_a, lora_b, ctx.scaling = inputs
        ctx.save_for_backward(bias, x, output[1], lora_a, lora_b)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 6
        need_x, _, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        needs = (need_x, need_bias, need_a, need_b)
        dx, dbias, da, db = _lora_gradients(needs, g, ctx.weight, ctx.saved_tensors, ctx.scaling)
        return dx, None, dbias, da, db, None


# ---- registered operators --------------------------------------------------------------------------------------------

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor? codebook, Tensor? nested_absmax, Tensor? nested_map, Tensor? nested_offset, "
    "SymInt out_features, SymInt in_features, int block_size, int nested_block_size, int compute"
)
_WEIGHT_ARGS = len(PackedWeight._fields)

_library = torch.library.Library("nybble", "DEF")
_library.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? side, Tensor? side_weight) -> Tensor")
_library.define(f"grad_input(Tensor grad, {_WEIGHT}, Tensor? side, Tensor? side_weight) -> Tensor")
_library.define(
    f"lora_linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling) -> (Tensor, Tensor)"
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
    weight, rest = _split(args)
    return _lora_linear(x, weight, *rest)


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
    weight, (bias, lora_a, lora_b, _) = _split(args)
    _check_lora(x, weight, lora_a, lora_b)
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
        (g @ side_weight.to(g.dtype)).to(side.dtype) if need_side else None,
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
    weight, (bias, lora_a, lora_b, scaling) = _split(inputs[1:])
    _save_weight(ctx, weight, bias, inputs[0], output[1], lora_a, lora_b)
    ctx.scaling = scaling
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _lora_linear_backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    weight, saved = _saved(ctx)
    needs = ctx.needs_input_grad
    if g is None:
        return (None,) * len(needs)
    need_bias, need_a, need_b, _scaling = needs[1 + _WEIGHT_ARGS :]
    dx, dbias, da, db = _lora_gradients((needs[0], need_bias, need_a, need_b), g, weight, saved, ctx.scaling)
    return dx, *(None,) * _WEIGHT_ARGS, dbias, da, db, None


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
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return (x, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype in _FLOATS else t for t in (x, *others))


def _traced(*tensors: Tensor | None) -> bool:
    """Whether somebody watches operators go by: a compiler, a tracer, a dispatch mode or a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or any(t is not None and type(t) not in _PLAIN for t in tensors)
    )


def _differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see the call: reverse mode, torch.func, or forward mode (which autograd then refuses)."""
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
