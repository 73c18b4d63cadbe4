"""Tensors whose memory ends (or begins) at a page that must not be touched, and read-only ones."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .build import load


def guarded_empty(
    shape: Sequence[int], dtype: torch.dtype, alignment: int | None = 16, end: bool = True, name: str = "tensor"
) -> Tensor:
    """Memory as `guarded` has it, all bits set: a NaN of every floating dtype."""
    _, control = load()
    size = math.prod(shape) * dtype.itemsize
    if size == 0:  # torch gives such a tensor no address
        return torch.empty(tuple(shape), dtype=dtype)
    address = control.guard(size, alignment or dtype.itemsize, end, name)
    memory = (ctypes.c_char * size).from_address(address)
    weakref.finalize(memory, control.release, address)  # which torch holds for as long as the storage lives
    data = torch.frombuffer(memory, dtype=torch.uint8).fill_(0xFF)
    return data.view(dtype).view(tuple(shape))


def guarded(
    tensor: Tensor, end: bool = True, alignment: int | None = 16, read_only: bool = False, name: str = "tensor"
) -> Tensor:
    """A contiguous copy whose last byte is followed by an unmapped page, or whose first byte follows one.

    Its address is a multiple of `alignment` (None: of the size of its elements), so with end=True up to alignment - 1
    bytes may lie between its end and the page. A kernel that touches the page, or writes to a read-only one, fails
    with a message that has `name`. What torch itself writes to a read-only one kills the process.
    """
    copy = guarded_empty(tensor.shape, tensor.dtype, alignment, end, name).copy_(tensor.detach())
    if read_only and copy.numel():
        _, control = load()
        control.protect(copy.data_ptr(), True)
    return copy
