"""How one operation reaches one kernel, a module for each kind of device.

Every module has the codecs of `nybble.reference` under the same names and signatures, and `linear` and `grad_input`
on a `PackedWeight`. `portable` is plain torch and serves every device that has no kernels of its own.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import cpu, cuda, mps, portable
from .weight import BoundWeight, PackedWeight

__all__ = ["BoundWeight", "PackedWeight", "cpu", "cuda", "mps", "of", "portable"]


def of(tensor_or_device: Tensor | torch.device | str) -> ModuleType:
    """The module whose kernels serve this device."""
    if isinstance(tensor_or_device, Tensor) and tensor_or_device.is_cpu:
        return cpu
    device = tensor_or_device.device if isinstance(tensor_or_device, Tensor) else torch.device(tensor_or_device)
    if device.type == "cuda":
        return cuda if cuda.serves(device) else portable
    if device.type == "mps":
        return mps if mps.serves(device) else portable
    return cpu if device.type == "cpu" else portable
