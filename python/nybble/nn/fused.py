"""The elementwise parts of a decoder layer as single kernels that save little for the backward pass.

    rms_norm(x, weight, eps, offset)   x / sqrt(mean(x^2) + eps) * (weight + offset)
    gated(gate, up, activation)        activation(gate) * up
    rotary(q, k, cos, sin)             the rotary position embedding, pairs a half apart

On the CPU each runs in one pass in fp32 and rounds its result once. What is saved are its inputs as they are and one
fp32 number a row, where the same formula in torch saves an fp32 copy of every intermediate. Gradients are right once;
differentiating twice raises torch's error. Elsewhere (other devices and dtypes, `torch.compile`, torch.func, dispatch
modes, tensor subclasses) the plain formulas run, which are also the kernels' specification: `plain_rms_norm`,
`plain_gated`, `plain_rotary`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..backends import elementwise
from ..backends.addresses import DTYPE_CODES
from ..backends.weight import PLAIN
from ..errors import LayoutError

ACTIVATIONS = tuple(elementwise.ACTIVATIONS)


# ---- the specification -----------------------------------------------------------------------------------------------


def plain_rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None
) -> Tensor:
    """`rms_norm` in torch, in fp32 or, for float64, in that."""
    dtype = dtype or torch.promote_types(x.dtype, weight.dtype)
    x, weight = _wide(x), _wide(weight)
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)).to(dtype)


def plain_gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`gated` in torch, in fp32 or, for float64, in that."""
    z = _wide(gate)
    acted = functional.silu(z) if activation == "silu" else functional.gelu(z, approximate="tanh")
    return (acted * _wide(up)).to(torch.promote_types(gate.dtype, up.dtype))


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary` in torch, in fp32 or, for float64, in that."""
    return _plain_rotate(q, cos, sin), _plain_rotate(k, cos, sin)


def _plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, cos.dtype)
    x, cos, sin = _wide(x), _wide(cos).unsqueeze(1), _wide(sin).unsqueeze(1)
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- what callers use ------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """Root mean square normalization (arXiv 1910.07467) over the last dimension.

    Args:
        x: [..., k]. weight: [k]; its gradient is computed only if it is asked for.
        eps: added to the mean of squares. offset: added to the weight, 1 for Gemma's.
        dtype: of the result; by default what torch promotes x's and weight's to.

    Returns:
        [..., k], contiguous.

    Raises:
        LayoutError: weight does not fit x.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise LayoutError(
            f"weight has shape {list(weight.shape)}; it must be [k], the last dimension of x {list(x.shape)}"
        )
    dtype = dtype or torch.promote_types(x.dtype, weight.dtype)
    if not (_fused(x, weight) and (dtype == x.dtype or dtype == torch.float32 or x.dtype == torch.float32)):
        return plain_rms_norm(x, weight, eps, offset, dtype)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RmsNorm.apply(x, weight, eps, offset, dtype)
    return elementwise.rms_norm(x, weight, eps, offset, dtype)[0]


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """activation(gate) * up, the gated unit of a decoder's MLP (arXiv 2002.05202).

    On the CPU, silu of an fp32 z is within 8 * 2^-24 of itself (gelu_tanh: times 1 + 2 z^2 where z < 0), or 2^-120.

    Args:
        gate, up: [..., k]; two dtypes are promoted. activation: "silu" or "gelu_tanh".

    Returns:
        [..., k], contiguous.

    Raises:
        LayoutError: the shapes differ. ValueError: another activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}")
    if gate.shape != up.shape:
        raise LayoutError(f"up has shape {list(up.shape)}; it must be gate's, {list(gate.shape)}")
    if gate.dtype != up.dtype or gate.dim() == 0 or not _fused(gate, up):
        return plain_gated(gate, up, activation)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(gate, up, activation)
    return elementwise.gated(gate, up, activation)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv 2104.09864): x * cos + rotate_half(x) * sin for q and k.

    Args:
        q: [B, H, T, D], k: [B, H', T, D], D even; any strides.
        cos, sin: [B or 1, T, D]; constants.

    Returns:
        q's and k's, in the dtypes that torch promotes theirs and cos's to; strides are kept where they have no gaps.

    Raises:
        LayoutError: shapes do not fit.
    """
    for name, x in (("q", q), ("k", k)):
        if not rotates(x, cos, sin):
            raise LayoutError(
                f"{name} has shape {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}; "
                "they must be [B, H, T, D] with D even, and [B or 1, T, D]"
            )
    if cos.dtype != sin.dtype or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
        return plain_rotary(q, k, cos, sin)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def rotates(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotary` takes these shapes."""
    if x.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    batch, _, length, dim = x.shape
    return cos.shape[0] in (1, batch) and cos.shape[1:] == (length, dim) and dim % 2 == 0


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, cos.dtype)
    if not _fused(x, cos, sin):
        return _plain_rotate(x, cos, sin)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotary.apply(x, cos, sin, dtype)
    return elementwise.rotary(x, cos, sin, dtype)


def _fused(*tensors: Tensor) -> bool:
    """Whether a kernel can take them, and nobody watches operators go by (a compiler, a mode, a transform)."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0:
        return False
    for tensor in tensors:
        if type(tensor) not in PLAIN or not tensor.is_cpu or tensor.dtype not in DTYPE_CODES or not tensor.numel():
            return False
    return True


# ---- eager with gradient ---------------------------------------------------------------------------------------------


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
        out, rstd = elementwise.rms_norm(x, weight, eps, offset, dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = elementwise.rms_norm_backward(grad, x, weight, rstd, ctx.offset, ctx.needs_input_grad[1])
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return elementwise.gated(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *elementwise.gated_backward(grad, gate, up, ctx.activation), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return elementwise.rotary(x, cos, sin, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return elementwise.rotary(grad, cos, sin, ctx.dtype, transposed=True), None, None, None
