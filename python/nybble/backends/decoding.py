"""One token after another on the CPU: tensors to the compiled core. Nothing is checked again here.

`nybble.reference_attention.step` and a plain matrix product say what they compute; both compute in fp32 and round once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import _core
from .addresses import DTYPE_CODES

MOST_ROWS = _core.MOST_DENSE_ROWS
"""Rows of x that `dense` takes."""


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Callable[[], None]:
    """A call that computes out [m, rows] = x [m, cols] weight^T + bias, as often as it is made.

    All of them fp32, fp16 or bf16 in any mix, the rows of x contiguous, the others as a whole; m is at most MOST_ROWS.
    The tensors must outlive the call and stay where they are.
    """
    return partial(
        _core.dense_few,
        x.data_ptr(),
        x.stride(0),
        DTYPE_CODES[x.dtype],
        x.shape[0],
        weight.data_ptr(),
        DTYPE_CODES[weight.dtype],
        weight.shape[0],
        weight.shape[1],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        torch.get_num_threads(),
    )


def attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    scale: float,
    out: Tensor,
) -> Callable[[int], None]:
    """A call that computes `nybble.reference_attention.step` for a slot, as often as it is made.

    Args:
        query: [B, heads, D], key, value: [B, kv heads, D], the heads of a row beside each other.
        table: cos and sin, each [B, D], contiguous, of one dtype; None: no rotation.
        keys, values: [B, kv heads, slots, D], contiguous, of the query's dtype; the call writes to the slot.
        first: int64 [B]. out: [B, heads, D], contiguous, of the query's dtype.

    The tensors must outlive the call and stay where they are.
    """
    batch, heads, depth = query.shape
    inputs = tuple(n for x in (query, key, value) for n in (x.data_ptr(), x.stride(0)))
    dtype, tables = DTYPE_CODES[query.dtype], (0, 0, 0)
    if table is not None:
        tables = (table[0].data_ptr(), table[1].data_ptr(), DTYPE_CODES[table[0].dtype])
    cache = (keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(1))
    first_address, sizes = first.data_ptr(), (batch, heads, heads // key.shape[1], depth)
    address, threads, run = out.data_ptr(), torch.get_num_threads(), _core.attention_step

    def step(slot: int) -> None:
        run(inputs, dtype, tables, cache, first_address, slot, sizes, scale, address, threads)

    return step
