"""Scaled dot product attention on the CPU: tensors to the compiled core, checked by `nybble.nn.sdpa`.

Query, key and value share a dtype; they, the mask and what is read beside them have contiguous columns, and the mask
[B, H, T, S] is expanded to the scores' sizes. Nothing is checked again here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _core
from .addresses import DTYPE_CODES


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, diagonal: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `nybble.reference_attention.forward`; computes in fp32, bf16 weights and values multiplied as bf16 pairs
    where the CPU has instructions for it.

    Returns:
        The output [B, H, T, Dv] in the query's dtype, heads side by side in memory as the layers that follow want
        them, and logsumexp, fp32 [B, H, T].
    """
    batches, heads, rows = query.shape[:3]
    output = torch.empty(batches, rows, heads, value.shape[3], dtype=query.dtype).transpose(1, 2)
    logsumexp = torch.empty(batches, heads, rows, dtype=torch.float32)
    _core.attention_forward(
        **_inputs(query, key, value, mask, diagonal, scale),
        output=_strided(output),
        logsumexp=logsumexp.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return output, logsumexp


def scores_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    grad_output: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    diagonal: int | None,
    scale: float,
    p: Tensor,
    ds: Tensor,
) -> None:
    """See `nybble.reference_attention.scores_grad`; computes in fp32 and writes to p and ds [B, H, T, S], contiguous.

    output and grad_output have the query's dtype; logsumexp [B, H, T] is fp32 of any strides.
    """
    _core.attention_scores_grad(
        **_inputs(query, key, value, mask, diagonal, scale),
        output=_strided(output),
        grad_output=_strided(grad_output),
        logsumexp=_strided(logsumexp),
        p=p.data_ptr(),
        ds=ds.data_ptr(),
        out_dtype=DTYPE_CODES[p.dtype],
        threads=torch.get_num_threads(),
    )


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, diagonal: int | None, scale: float
) -> dict[str, Any]:
    batches, heads, rows, depth = query.shape
    kv_heads, cols = key.shape[1:3]
    return {
        "query": _strided(query),
        "key": _strided(key),
        "value": _strided(value),
        "dtype": DTYPE_CODES[query.dtype],
        "mask": (0, 0, 0, 0) if mask is None else _strided(mask),
        "mask_dtype": 0 if mask is None else -1 if mask.dtype == torch.bool else DTYPE_CODES[mask.dtype],
        "sizes": (batches, heads, heads // kv_heads, rows, cols, depth, value.shape[3]),
        "diagonal": cols if diagonal is None else diagonal,
        "scale": scale,
    }


def _strided(x: Tensor) -> tuple[int, int, int, int]:
    """The address, and the strides of batches, heads and rows."""
    strides = x.stride()
    return x.data_ptr(), strides[0], strides[1], strides[2]
