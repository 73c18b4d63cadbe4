"""What every backend does with torch's tensors before their addresses go to compiled code."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

#: The core's codes of the dtypes that it computes with, and of the ways to find a block's scale.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SEARCHES = {"absmax": 0, "mse": 1, "square": 2, "importance": 3}

LinearOperands: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int, int]


def contiguous_values(x: Tensor) -> Tensor:
    """`x` as its address says: contiguous, and with a lazy negation carried out."""
    return x if x.is_contiguous() and not x.is_neg() else x.detach().resolve_neg().contiguous()


def contiguous_rows(x: Tensor) -> Tensor:
    """[..., k] as [m, k] with the last dimension contiguous; a view where the strides permit."""
    x = x.detach().resolve_neg()
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() != 2 else x
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def new_output(x: Tensor, columns: int) -> Tensor:
    """Memory for [..., columns] like x, by the cheapest call: 0.7 us, where torch.empty takes 1.0 to 1.4."""
    shape = x.shape
    if columns and len(shape) == 2:
        return x.new_empty_strided((shape[0], columns), (columns, 1))
    if columns and len(shape) == 3 and shape[1]:
        return x.new_empty_strided((shape[0], shape[1], columns), (shape[1] * columns, columns, 1))
    return x.new_empty(*shape[:-1], columns)


def address_of(tensor: Tensor | None) -> int:
    """Where it lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def linear_operands(
    x: Tensor, bias: Tensor | None, side: Tensor | None, side_weight: Tensor | None
) -> tuple[Any, LinearOperands]:
    """What a core's `linear` takes between `compute` and `out`, and tensors to keep until the kernel has read them."""
    shape = x.shape
    if x.is_contiguous() and not x.is_neg():
        stride = shape[-1]
        m = shape[0] if len(shape) == 2 else math.prod(shape[:-1])
    else:
        x = contiguous_rows(x)
        m, stride = x.shape[0], x.stride(0)
    bias_address = bias_code = side_address = side_code = right_address = right_code = rank = 0
    if bias is not None:
        bias = contiguous_values(bias)
        bias_address, bias_code = bias.data_ptr(), DTYPE_CODES[bias.dtype]
    if side is not None and side_weight is not None:
        side, side_weight, rank = contiguous_values(side), contiguous_values(side_weight), side.shape[-1]
        side_address, side_code = side.data_ptr(), DTYPE_CODES[side.dtype]
        right_address, right_code = side_weight.data_ptr(), DTYPE_CODES[side_weight.dtype]
    return (x, bias, side, side_weight), (
        x.data_ptr(),
        stride,
        m,
        DTYPE_CODES[x.dtype],
        side_address,
        side_code,
        right_address,
        right_code,
        rank,
        bias_address,
        bias_code,
    )
