"""Which path a call takes, and in which dtype: plain, through autograd, or as a registered operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import PackedWeight
from ..backends.weight import PLAIN
from .arguments import FLOATS

PLAIN_CALL, DIFFERENTIATED, TRACED = 0, 1, 2

autocast_anywhere = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
transforms_active = torch._C._are_functorch_transforms_active


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for this type of device; of one that has none, such as "meta", torch refuses to tell."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Tensors in autocast's dtype if autocast is on for x's type of device, else as they are."""
    device = "cpu" if x.is_cpu else x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return (x, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype in FLOATS else t for t in (x, *others))


def path_of(x: Tensor, weight: PackedWeight, *others: Tensor | None) -> int:
    """Which path a call takes.

    TRACED where somebody watches operators go by: a compiler, a tracer, a dispatch mode or a tensor subclass;
    DIFFERENTIATED where autograd has to see the call: reverse mode, torch.func, or forward mode (which autograd then
    refuses); else PLAIN_CALL.
    """
    if torch.compiler.is_compiling() or _dispatch_modes() > 0 or _tracing_state() is not None:
        return TRACED
    if type(x) not in PLAIN or type(weight[0]) not in PLAIN:
        return TRACED
    needs_grad = x.requires_grad
    for tensor in others:
        if tensor is not None:
            if type(tensor) not in PLAIN:
                return TRACED
            needs_grad = needs_grad or tensor.requires_grad
    if (needs_grad and torch.is_grad_enabled()) or transforms_active() or forward_ad._current_level >= 0:
        return DIFFERENTIATED
    return PLAIN_CALL
