"""The operators as `torch.ops.nybble.*`: schema, what a tracer sees, and gradients.

Importing this registers them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import PackedWeight
from .arguments import check_args, check_lora
from .bodies import grad_input_body, linear_body, lora_linear_body
from .calls import grad_input, grad_input_gradients, lora_gradients
from .side_gradients import bias_gradient, product_gradient, times

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
    return linear_body(x, weight, *rest)


def _grad_input_impl(g: Tensor, *args: Any) -> Tensor:
    weight, rest = _split(args)
    return grad_input_body(g, weight, *rest)


def _lora_linear_impl(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, (bias, lora_a, lora_b, scaling, *mask) = _split(args)
    return lora_linear_body(x, weight, bias, lora_a, lora_b, scaling, *(mask or (None,)))


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
        bias_gradient(g, bias) if need_bias else None,
        times(g, side_weight.to(g.dtype)).to(side.dtype) if need_side else None,
        product_gradient(g, side, side_weight) if need_side_weight else None,
    )


def _grad_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, (side, side_weight) = _split(inputs[1:])
    _save_weight(ctx, weight, side, side_weight)


def _grad_input_backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
    weight, (side, side_weight) = _saved(ctx)
    needs = ctx.needs_input_grad
    need_side, need_side_weight = needs[1 + _WEIGHT_ARGS :]
    dg, dside, dside_weight = grad_input_gradients(
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
