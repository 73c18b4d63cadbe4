"""Products with LoRA's factors on CPUs that multiply bf16 pairs: a wide matrix is read once, where it lies.

`apply` and `gradient` are for matrices of which `fits` said yes; everything else is `nybble.backends.products`'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _core
from .addresses import DTYPE_CODES
from .products import plain

#: The ISAs under which these kernels have been measured to be faster than torch's products.
_FASTER = ("avx512bf16",)
#: Ranks up to which `gradient` is the faster one: it reads x again for every 16 (rank 16: torch takes 1.1 to 1.7 times
#: as long, rank 64 0.7 to 0.8; bench/factors.py).
MOST_GRADIENT_RANK = 16
#: Fewer rows are not worth arranging the factor.
_LEAST_ROWS = 64


def fits(x: Tensor, rank: int) -> bool:
    """Whether the kernels take x [m, k] and a factor of this rank: plain CPU tensors, no gradient to record."""
    return (
        plain(x)
        and x.dtype == torch.bfloat16
        and x.shape[0] >= _LEAST_ROWS
        and 0 < rank <= _core.MOST_RANK
        and not (torch.is_grad_enabled() and x.requires_grad)
        and _core.active_isa() in _FASTER
    )


def apply(x: Tensor, factor: Tensor, scale: float, by_rank: bool) -> Tensor:
    """scale * x . factor^T, bf16 [m, rank], rounded once.

    Args:
        x: bf16 [m, k]. factor: [rank, k] (`by_rank`, LoRA's A) or [k, rank] (LoRA's B), in any of the three dtypes;
            rounded to bf16.
    """
    x, factor = _rows(x), factor.detach().contiguous()
    m, k = x.shape
    rank = factor.shape[0 if by_rank else 1]
    out = torch.empty(m, rank, dtype=torch.bfloat16)
    _core.factor_apply(
        x.data_ptr(),
        x.stride(0),
        m,
        k,
        rank,
        factor.data_ptr(),
        DTYPE_CODES[factor.dtype],
        by_rank,
        scale,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def gradient(left: Tensor, x: Tensor, by_rank: bool) -> Tensor:
    """left^T . x in fp32: [rank, k] (`by_rank`, of LoRA's A), or its transpose [k, rank] (of LoRA's B).

    Args:
        left: bf16 [m, rank]. x: bf16 [m, k].
    """
    left, x = left.detach().contiguous(), _rows(x)
    (m, k), rank = x.shape, left.shape[1]
    out = torch.empty((rank, k) if by_rank else (k, rank), dtype=torch.float32)
    _core.factor_gradient(
        left.data_ptr(),
        x.data_ptr(),
        x.stride(0),
        m,
        k,
        rank,
        out.data_ptr(),
        k if by_rank else 1,
        1 if by_rank else rank,
        torch.get_num_threads(),
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """x with contiguous rows: nearly always itself."""
    x = x.detach().resolve_neg()
    return x if x.stride(-1) == 1 and x.stride(0) >= 0 else x.contiguous()
