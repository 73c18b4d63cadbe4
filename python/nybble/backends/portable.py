"""Any device in plain torch: the reference codecs, and contractions with the dequantized weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import (
    check_out,
    dequantize_4bit,
    dequantize_8bit,
    dequantize_int8,
    linear_int8_activations,
    nested_dequantize,
    nested_quantize,
    quantize_4bit,
    quantize_8bit,
    quantize_int8,
    round_descent,
    round_feedback,
)
from . import cuda, mps
from .weight import PackedWeight, as_float

__all__ = [
    "dequantize",
    "dequantize_4bit",
    "dequantize_8bit",
    "dequantize_int8",
    "explain_linear",
    "grad_input",
    "linear",
    "nested_dequantize",
    "nested_quantize",
    "quantize_4bit",
    "quantize_8bit",
    "quantize_int8",
    "round_descent",
    "round_feedback",
]


def dequantize(weight: PackedWeight, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The weight [out_features, in_features] in `dtype`; written to `out` if that is given, which is then returned."""
    if out is None:
        return _dequantize(weight, dtype)
    check_out(out, (weight.out_features, weight.in_features), dtype, weight.packed.device)
    return out.copy_(_dequantize(weight, dtype))


def _dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    weight.check()
    absmax = weight.absmax
    if weight.codebook is None:
        return dequantize_int8(weight.packed.view(weight.out_features, weight.in_features), as_float(absmax), dtype)
    if weight.nested_absmax is not None and weight.nested_map is not None and weight.nested_offset is not None:
        absmax = nested_dequantize(
            absmax,
            as_float(weight.nested_absmax),
            as_float(weight.nested_map),
            as_float(weight.nested_offset),
            weight.nested_block_size,
        )
    shape = (weight.out_features, weight.in_features)
    return dequantize_4bit(weight.packed, as_float(absmax), as_float(weight.codebook), weight.block_size, shape, dtype)


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, side: Tensor | None, side_weight: Tensor | None
) -> Tensor:
    """x W^T + side side_weight^T + bias in x's dtype; x [..., in_features]; weight.compute as on the CPU."""
    if weight.compute == 1:
        return linear_int8_activations(
            x, dequantize(weight, torch.float32), bias, side, side_weight, weight.outlier_threshold
        )
    y = x @ dequantize(weight, x.dtype).t()
    if side is not None and side_weight is not None:
        y = y + side.to(x.dtype) @ side_weight.to(x.dtype).t()
    return y if bias is None else y + bias.to(x.dtype)


def grad_input(g: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None) -> Tensor:
    """g W + side side_weight in g's dtype; g [..., out_features]."""
    dx = g @ dequantize(weight, g.dtype)
    if side is not None and side_weight is not None:
        dx = dx + side.to(g.dtype) @ side_weight.to(g.dtype)
    return dx


def explain_linear(
    out_features: int,
    in_features: int,
    m: int,
    dtype: torch.dtype,
    int8: bool,
    grad_input: bool,
    compute: int = 0,
    block_size: int = 64,
    device: torch.device | None = None,
) -> dict[str, str]:
    """What would run, and why."""
    served = {"cuda": cuda, "mps": mps}.get("" if device is None else device.type)
    why = "there are none for its kind yet" if served is None or device is None else served.missing(device)
    rounded = compute == 1 and not grad_input
    return {
        "kernel": "dequantize + matmul",
        "isa": "torch",
        "compute": "int8 activations, fp32" if rounded else str(dtype).removeprefix("torch."),
        "reason": f"this device has no kernels of nybble's own ({why}); torch does it with the dequantized weight",
    }
