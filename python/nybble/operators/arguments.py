"""The one place that validates what reaches a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import BoundWeight, PackedWeight
from ..errors import LayoutError, UnsupportedDtypeError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
    if x.dtype not in FLOATS:
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
    if tensor.dtype not in FLOATS:
        raise UnsupportedDtypeError(f"{name} has dtype {tensor.dtype}; allowed are float32, float16, bfloat16")
    if tensor.shape != shape:
        raise LayoutError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
    if not (tensor.is_cpu and x.is_cpu):
        _check_device(tensor, x, name)


def _check_device(tensor: Tensor, x: Tensor, name: str) -> None:
    if tensor.device != x.device:
        raise LayoutError(f"{name} is on {tensor.device}, but the input is on {x.device}; move one of them")


def check_lora(x: Tensor, weight: PackedWeight, lora_a: Tensor, lora_b: Tensor, mask: Tensor | None) -> None:
    """Before x A^T is computed, what `check_args` says only of its result; x itself first."""
    if x.dim() == 0 or x.shape[-1] != weight.in_features or x.dtype not in FLOATS:
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
