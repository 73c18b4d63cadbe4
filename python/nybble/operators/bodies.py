"""What every path of a call computes: arguments checked, then the kernel of their device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from ..backends import PackedWeight, factors
from ..backends.products import product
from .arguments import check_args, check_lora


def linear_body(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, side: Tensor | None, side_weight: Tensor | None
) -> Tensor:
    check_args(x, weight, bias, side, side_weight, False)
    return backends.of(x).linear(x, weight, bias, side, side_weight)


def grad_input_body(g: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None) -> Tensor:
    check_args(g, weight, None, side, side_weight, True)
    return backends.of(g).grad_input(g, weight, side, side_weight)


def lora_linear_body(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the side path's left factor scaling x A^T [..., R], which the backward wants again."""
    check_lora(x, weight, lora_a, lora_b, mask)
    if torch.is_grad_enabled():
        x, lora_a = x.detach(), lora_a.detach()
    side = side_factor(x, lora_a, scaling, mask)
    return linear_body(x, weight, bias, side, lora_b), side


def side_factor(x: Tensor, lora_a: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """scaling x A^T * mask in x's dtype; for fp16, whose range the product may leave, in fp32."""
    return factor_applied(x, lora_a, True, scaling, mask)


def factor_applied(x: Tensor, factor: Tensor, by_rank: bool, scaling: float, mask: Tensor | None) -> Tensor:
    """scaling x factor^T * mask in x's dtype, for fp16 in fp32; factor [R, n] (`by_rank`, LoRA's A) or [n, R] (B)."""
    rank = factor.shape[0 if by_rank else 1]
    rows, shape = flat(x), (*x.shape[:-1], rank)
    if mask is None and factors.fits(rows, rank) and not (torch.is_grad_enabled() and factor.requires_grad):
        return factors.apply(rows, factor, scaling, by_rank).view(shape)
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    factor = cast(factor, dtype)
    return scaled(product(cast(rows, dtype), factor.t() if by_rank else factor).view(shape), scaling, mask)


def scaled(x: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """x [..., R] * scaling * mask in x's dtype, rounded once."""
    if mask is None:
        return x * scaling
    return cast(x * spread(mask * scaling, x), x.dtype)


def spread(rows: Tensor, like: Tensor) -> Tensor:
    """Values [B, n] for every row of the batch, shaped so that they multiply `like` [B, ..., n]."""
    return rows if like.dim() == 2 else rows.view(rows.shape[0], *(1,) * (like.dim() - 2), rows.shape[1])


def flat(x: Tensor) -> Tensor:
    """[..., k] as [m, k]; the number of rows is said, because -1 is ambiguous where k is 0."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # 0.7 us of `to` for nothing
