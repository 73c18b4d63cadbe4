"""What the codecs of every backend do alike: check their arguments, as `nybble.reference` does, and make their memory.

Memory is made where the values are, which is said every time: a caller's default device must not decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..errors import LayoutError
from ..formats import check_block_size
from .addresses import contiguous_values
from .weight import PackedWeight


def quantize_4bit_tensors(
    x: Tensor, codebook: Tensor, block_size: int, search: str, name: str, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x` and `codebook` as kernels read them; packed uint8 [ceil(n / 2), 1] and absmax fp32, to be written.

    Arguments and errors: `nybble.reference.quantize_4bit`; that values are finite, kernels tell.
    """
    reference.check_float(x, name)
    check_block_size(block_size)
    reference.check_codebook(codebook, 16, x.device)
    reference.check_search(search, importance, x)
    n = x.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=x.device)
    return contiguous_values(x), codebook.contiguous(), packed, _scales(x, -(-n // block_size))


def quantize_8bit_tensors(x: Tensor, code: Tensor, block_size: int, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x` and `code` as kernels read them; q uint8 of x's shape and absmax fp32, to be written.

    Arguments and errors: `nybble.reference.quantize_8bit`; that values are finite, kernels tell.
    """
    reference.check_float(x, name)
    check_block_size(block_size)
    reference.check_codebook(code, 256, x.device)
    q = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    return contiguous_values(x), code.contiguous(), q, _scales(x, -(-x.numel() // block_size))


def quantize_int8_tensors(x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """`x` as kernels read it; q int8 [N, K] and scb fp32 [N], to be written.

    Arguments and errors: `nybble.reference.quantize_int8`; that values are finite, kernels tell.
    """
    reference.check_float(x, name)
    if x.dim() != 2:
        raise LayoutError(f"{name} has shape {tuple(x.shape)}; int8 quantization takes a matrix [N, K]")
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return contiguous_values(x), q, _scales(x, x.shape[0])


def dequantize_8bit_tensors(
    q: Tensor, absmax: Tensor, code: Tensor, block_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first three as kernels read them; values in `dtype` of q's shape, to be written.

    Arguments and errors: `nybble.reference.dequantize_8bit`.
    """
    check_block_size(block_size)
    reference.check_codebook(code, 256, q.device)
    reference.check_8bit(q, absmax, block_size)
    reference.check_output_dtype(dtype)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    return q.contiguous(), absmax.contiguous(), code.contiguous(), out


def flat_weight(
    packed: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, shape: Sequence[int], dtype: torch.dtype
) -> PackedWeight:
    """What `nybble.reference.dequantize_4bit` decodes, as a weight of one row; the errors are the same."""
    check_block_size(block_size)
    reference.check_codebook(codebook, 16, packed.device)
    reference.check_output_dtype(dtype)
    n = math.prod(shape)
    reference.check_packed(packed, absmax, block_size, n)
    tensors = packed.contiguous(), absmax.contiguous(), codebook.contiguous()
    return PackedWeight(*tensors, None, None, None, 1, n, block_size, 1)


def int8_weight(q: Tensor, scb: Tensor, dtype: torch.dtype) -> PackedWeight:
    """What `nybble.reference.dequantize_int8` decodes, as a weight; the errors are the same."""
    reference.check_int8(q, scb)
    reference.check_output_dtype(dtype)
    return PackedWeight(q.contiguous(), scb.contiguous(), None, None, None, None, q.shape[0], q.shape[1], 0, 1)


def dequantized(weight: PackedWeight, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Where the weight [out_features, in_features] is to be decoded to: `out`, or new memory if that is None.

    Raises LayoutError or UnsupportedDtypeError as `PackedWeight.check` and `nybble.reference.check_out` do.
    """
    weight.check()
    reference.check_output_dtype(dtype)
    shape, device = (weight.out_features, weight.in_features), weight.packed.device
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    reference.check_out(out, shape, dtype, device)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # as any write by torch does, so that autograd can tell
    return out


def _scales(x: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device=x.device)
