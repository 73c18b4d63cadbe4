"""Gradients that pass no quantized weight: of a bias, of a side path and of its factors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import factors
from ..backends.products import product
from .bodies import cast, flat


def bias_gradient(g: Tensor, bias: Tensor) -> Tensor:
    """The sum of g [..., n] over all rows, in fp32, then in the bias's dtype."""
    return flat(g).sum(0, dtype=torch.float32).to(bias.dtype)


def product_gradient(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """left^T right over all rows, in the dtype of the parameter whose gradient it is."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    return product(flat(left).to(dtype).t(), flat(right).to(dtype), like.dtype)


def factor_gradient(side: Tensor, x: Tensor, by_rank: bool, like: Tensor) -> Tensor:
    """side^T x of all rows, the gradient of LoRA's A (`by_rank`), or x^T side, that of B; in the parameter's dtype."""
    left, rows, rank = flat(side), flat(x), side.shape[-1]
    if rank <= factors.MOST_GRADIENT_RANK and factors.fits(left, rank) and factors.fits(rows, rank):
        return cast(factors.gradient(left, rows, by_rank), like.dtype)
    return product_gradient(side, x, like) if by_rank else product_gradient(x, side, like)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., k] . matrix [k, n]"""
    return product(flat(x), matrix).view(*x.shape[:-1], matrix.shape[1])
