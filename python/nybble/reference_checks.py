"""What the codecs of `nybble.reference`, and so those of every backend, refuse, and in which words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import FormatError, LayoutError, NonFiniteError, UnsupportedDtypeError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_float(x: Tensor, name: str) -> Tensor:
    """Returns `x` if it is fp32, fp16 or bf16; raises UnsupportedDtypeError otherwise."""
    if x.dtype not in _FLOATS:
        raise UnsupportedDtypeError(f"{name} has dtype {x.dtype}; float32, float16 and bfloat16 are supported")
    return x


def check_finite(x: Tensor, block_size: int, name: str, unit: str = "block") -> None:
    """Raises NonFiniteError naming the tensor and the first offending block if `x` (any shape) holds NaN or Inf."""
    flat = x.reshape(-1)
    bad = ~torch.isfinite(flat)
    count = int(bad.sum())
    if count:
        index = int(bad.to(torch.uint8).argmax())
        block = index // block_size
        raise NonFiniteError(
            name,
            index,
            count,
            f"{count} of {flat.numel()} values are not finite; the first is {flat[index].item()} at flat index {index} "
            f"in {unit} {block}, which starts at {block * block_size}",
        )


def check_search(search: str, importance: Tensor | None, x: Tensor) -> None:
    """Raises FormatError, LayoutError or UnsupportedDtypeError unless a search has what it needs."""
    if search not in ("absmax", "mse", "square", "importance"):
        raise FormatError(f"search is {search!r}; allowed are absmax, mse, square, importance")
    if (importance is None) == (search == "importance"):
        raise FormatError(f"search is {search!r} and importance is {'missing' if importance is None else 'given'}")
    if importance is None:
        return
    if importance.dtype != torch.float32:
        raise UnsupportedDtypeError(f"importance has dtype {importance.dtype}; it must be float32")
    if importance.dim() != 1 or not importance.numel() or not importance.is_contiguous():
        raise LayoutError(f"importance has shape {tuple(importance.shape)}; it must be [columns], contiguous")
    if importance.device != x.device:
        raise LayoutError(f"importance is on {importance.device}; it must be where the values are, on {x.device}")
    if not bool((importance >= 0).all()) or not bool(torch.isfinite(importance).all()):
        raise LayoutError("importance holds a number that is negative or not finite")


def check_codebook(code: Tensor, entries: int, device: torch.device | None = None) -> None:
    """Raises LayoutError or UnsupportedDtypeError unless `code` is fp32 [entries], on `device` if that is given."""
    if code.dtype != torch.float32:
        raise UnsupportedDtypeError(f"codebook has dtype {code.dtype}; it must be float32")
    if tuple(code.shape) != (entries,):
        raise LayoutError(f"codebook has shape {tuple(code.shape)}; it must be [{entries}]")
    if device is not None and code.device != device:
        raise LayoutError(f"codebook is on {code.device}; it must be where the values are, on {device}")


def check_packed(packed: Tensor, absmax: Tensor, block_size: int, n: int) -> None:
    """Raises LayoutError or UnsupportedDtypeError unless `packed` and `absmax` hold exactly n 4-bit values."""
    _check_stored("packed", packed, torch.uint8, math.ceil(n / 2), f"{n} elements")
    _check_scales(absmax, block_size, n, packed.device)


def check_8bit(q: Tensor, absmax: Tensor, block_size: int) -> None:
    """Raises LayoutError or UnsupportedDtypeError unless `q` is uint8 and `absmax` holds the scales of its blocks."""
    _check_stored("q", q, torch.uint8, q.numel(), "")
    _check_scales(absmax, block_size, q.numel(), q.device)


def check_int8(q: Tensor, scb: Tensor) -> None:
    """Raises LayoutError or UnsupportedDtypeError unless `q` is int8 [N, K] and `scb` fp32 [N]."""
    if q.dim() != 2:
        raise LayoutError(f"q has shape {tuple(q.shape)}; the int8 layout is a matrix [N, K]")
    _check_stored("q", q, torch.int8, q.numel(), "")
    _check_stored("scb", scb, torch.float32, q.shape[0], f"{q.shape[0]} rows", q.device)


def check_output_dtype(dtype: torch.dtype) -> None:
    """Raises UnsupportedDtypeError unless values can be decoded to `dtype`."""
    if dtype not in _FLOATS:
        raise UnsupportedDtypeError(f"dtype is {dtype}; float32, float16 and bfloat16 are supported")


def check_out(out: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Raises LayoutError or UnsupportedDtypeError unless `out` can take values of this shape and dtype as it is."""
    if out.dtype != dtype:
        raise UnsupportedDtypeError(f"out has dtype {out.dtype}; it must be {dtype}")
    if tuple(out.shape) != tuple(shape):
        raise LayoutError(f"out has shape {list(out.shape)}; it must be {list(shape)}")
    if out.device != device:
        raise LayoutError(f"out is on {out.device}; it must be where the weight is, on {device}")
    if not out.is_contiguous():
        raise LayoutError(f"out has strides {list(out.stride())}; it must be contiguous")
    if out.requires_grad:
        raise LayoutError("out requires a gradient; it must be a tensor without one, which is written as it is")


def _check_scales(absmax: Tensor, block_size: int, n: int, device: torch.device) -> None:
    blocks = math.ceil(n / block_size)
    _check_stored("absmax", absmax, torch.float32, blocks, f"{n} elements in blocks of {block_size}", device)


def _check_stored(
    name: str, tensor: Tensor, dtype: torch.dtype, size: int, why: str, device: torch.device | None = None
) -> None:
    if tensor.dtype != dtype:
        raise UnsupportedDtypeError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
    if tensor.numel() != size:
        raise LayoutError(f"{name} has {tensor.numel()} elements; {why} need {size}")
    if device is not None and tensor.device != device:
        raise LayoutError(f"{name} is on {tensor.device}; it must be where the codes are, on {device}")
