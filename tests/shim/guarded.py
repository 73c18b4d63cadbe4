"""Tensors whose memory ends (or begins) at a page that must not be touched, and read-only ones."""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

from .build import load


def guarded(
    tensor: Tensor, end: bool = True, alignment: int | None = 16, read_only: bool = False, name: str = "tensor"
) -> Tensor:
    """A contiguous copy whose last byte is followed by an unmapped page, or whose first byte follows one.

    Its address is a multiple of `alignment` (None: of the size of its elements), so with end=True up to alignment - 1
    bytes may lie between its end and the page. A kernel that touches the page, or writes to a read-only one, fails
    with a message that has `name`. What torch itself writes to a read-only one kills the process.
    """
    _, control = load()
    source = tensor.detach().contiguous()
    size = source.numel() * source.element_size()
    address = control.guard(size, alignment or source.element_size(), end, name)
    if size == 0:  # torch gives such a tensor no address
        control.release(address)
        return source
    memory = (ctypes.c_char * size).from_address(address)
    copy = torch.frombuffer(memory, dtype=torch.uint8).view(source.dtype).view(source.shape)
    copy.copy_(source)
    if read_only:
        control.protect(address, True)
    weakref.finalize(memory, control.release, address)  # which torch holds for as long as the storage lives
    return copy
