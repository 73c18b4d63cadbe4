"""The elementwise parts of a decoder layer on the CPU: tensors to the compiled core, checked by `nybble.nn.fused`.

All of them compute in fp32 and round each result once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _core
from .addresses import DTYPE_CODES

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def _matrix(x: Tensor) -> tuple[Tensor, int]:
    """[..., k] as [m, k] whose rows are contiguous, and the elements from one row to the next."""
    x = x.detach().resolve_neg()
    if not x.is_contiguous():
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        if x.stride(-1) != 1:
            x = x.contiguous()
        return x, x.stride(0)
    return x, x.shape[-1]


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y [..., k] in `dtype`, and 1 / sqrt(mean(x^2) + eps), fp32 [rows]."""
    out = _empty(x, dtype)
    columns = x.shape[-1]
    rows = x.numel() // columns
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    x, stride = _matrix(x)
    weight = weight.detach().contiguous()
    _core.rms_norm(
        x.data_ptr(),
        stride,
        DTYPE_CODES[x.dtype],
        rows,
        columns,
        weight.data_ptr(),
        DTYPE_CODES[weight.dtype],
        offset,
        eps,
        out.data_ptr(),
        DTYPE_CODES[dtype],
        rstd.data_ptr(),
        torch.get_num_threads(),
    )
    return out, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """dx in x's dtype, and dweight fp32 [k] if it is needed."""
    columns = x.shape[-1]
    grad_x = _empty(x, x.dtype)
    grad_weight = torch.empty(columns, dtype=torch.float32, device=x.device) if need_weight else None
    grad, grad_stride = _matrix(grad)
    x, stride = _matrix(x)
    weight = weight.detach().contiguous()
    _core.rms_norm_backward(
        grad.data_ptr(),
        grad_stride,
        DTYPE_CODES[grad.dtype],
        x.data_ptr(),
        stride,
        DTYPE_CODES[x.dtype],
        rstd.numel(),
        columns,
        weight.data_ptr(),
        DTYPE_CODES[weight.dtype],
        offset,
        rstd.data_ptr(),
        grad_x.data_ptr(),
        0 if grad_weight is None else grad_weight.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_x, grad_weight


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, all of one dtype."""
    out = _empty(gate, gate.dtype)
    columns = gate.shape[-1]
    gate, gate_stride = _matrix(gate)
    up, up_stride = _matrix(up)
    _core.gated(
        ACTIVATIONS[activation],
        gate.data_ptr(),
        gate_stride,
        up.data_ptr(),
        up_stride,
        DTYPE_CODES[out.dtype],
        out.numel() // columns,
        columns,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; all of one dtype."""
    grad_gate, grad_up = _empty(gate, gate.dtype), _empty(up, up.dtype)
    columns = gate.shape[-1]
    grad, grad_stride = _matrix(grad)
    gate, gate_stride = _matrix(gate)
    up, up_stride = _matrix(up)
    _core.gated_backward(
        ACTIVATIONS[activation],
        grad.data_ptr(),
        grad_stride,
        gate.data_ptr(),
        gate_stride,
        up.data_ptr(),
        up_stride,
        DTYPE_CODES[gate.dtype],
        grad_gate.numel() // columns,
        columns,
        grad_gate.data_ptr(),
        grad_up.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_gate, grad_up


def rotary(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """x [B, H, T, D] rotated, in `dtype` and, where x has no gaps, with x's strides; cos and sin are [B or 1, T, D].

    `transposed`: the transposed rotation, which takes a gradient of the result to that of x.
    """
    x = x.detach().resolve_neg()
    if x.stride(3) != 1:
        x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    if out.stride(3) != 1:
        out = _empty(x, dtype)
    cos, sin = cos.detach().contiguous(), sin.detach().contiguous()
    _core.rotary(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.shape,
        x.stride()[:3],
        cos.data_ptr(),
        sin.data_ptr(),
        DTYPE_CODES[cos.dtype],
        0 if cos.shape[0] == 1 else cos.stride(0),
        transposed,
        out.data_ptr(),
        DTYPE_CODES[dtype],
        out.stride()[:3],
        torch.get_num_threads(),
    )
    return out
