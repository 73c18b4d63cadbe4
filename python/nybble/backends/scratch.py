"""Memory on the CPU that is used again: new large buffers cost their page faults."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST_KEPT = 8 << 20
"""Bytes. Larger ones are made anew, so that one large input does not hold memory for ever."""

_memory = threading.local()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory of `shape` that this thread uses again for the same `name`, its contents undefined."""
    size = math.prod(shape) * dtype.itemsize
    buffers: dict[str, Tensor] = _memory.__dict__
    buffer = buffers.get(name)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= _LARGEST_KEPT:
            buffers[name] = buffer
    return buffer[:size].view(dtype).view(*shape)
