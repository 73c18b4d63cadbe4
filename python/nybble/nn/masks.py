"""Attention masks with virtual tokens in them: bool (True: may see) or additive."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def documents(positions: Tensor, batch: int) -> Tensor | None:
    """The mask that position_ids [B, T] without a mask mean to transformers: documents begin where they do not go on.
    None: it is one document."""
    if positions.dim() != 2:
        return None
    number = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(1)
    if not bool(number[:, -1].any()):
        return None
    same = number[:, None, :, None] == number[:, None, None, :]
    return same.tril().expand(batch, -1, -1, -1)


def extended(mask: Tensor, seen: Tensor, first: bool, eager: bool, dtype: torch.dtype) -> Tensor:
    """A mask [B, heads, T, keys] with virtual tokens `seen` [B or 1, n] before the keys, and with `first` before the
    queries, where they see themselves causally."""
    batch, count = max(mask.shape[0], seen.shape[0]), seen.shape[1]
    mask = mask.expand(batch, -1, -1, -1)
    front = seen[:, None, None].expand(batch, mask.shape[1], mask.shape[2], count)
    joined = join_masks(front, mask, eager, dtype)
    if not first:
        return joined
    square = torch.ones(count, count, dtype=torch.bool, device=mask.device).tril()
    above = square & seen[:, None, None] | torch.eye(count, dtype=torch.bool, device=mask.device)  # no row sees nothing
    above = functional.pad(above, (0, mask.shape[3])).expand(batch, mask.shape[1], count, -1)
    return torch.cat([as_mask(above, joined), joined], 2)


def join_masks(front: Tensor, mask: Tensor, eager: bool, dtype: torch.dtype) -> Tensor:
    """[front, mask] along the keys; front is bool. A bool mask becomes an additive one where attention is eager."""
    if mask.dtype == torch.bool and eager:
        mask = as_mask(mask, mask.new_empty((), dtype=dtype))
    return torch.cat([as_mask(front, mask), mask], -1)


def as_mask(seen: Tensor, like: Tensor) -> Tensor:
    """A bool mask in the dtype of another: additive if that is floating."""
    if not like.is_floating_point():
        return seen.to(like.dtype)
    zero = torch.zeros((), dtype=like.dtype, device=seen.device)
    return torch.where(seen, zero, torch.finfo(like.dtype).min)
