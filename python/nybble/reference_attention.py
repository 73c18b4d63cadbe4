"""The executable specification of attention: the forward pass, and what the backward pass needs of its softmax.

Plain torch, in fp32 (float64 for float64), on any device. Nothing here is written for speed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, diagonal: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query key^T + mask) value.

    Args:
        query: [B, H, T, D]. key: [B, H / group, S, D]. value: [B, H / group, S, Dv].
        mask: broadcast to [B, H, T, S]; bool, False hides a key, or what is added to the scores.
        diagonal: query t sees keys up to t + diagonal; None: all.

    Returns:
        The output [B, H, T, Dv], 0 for a query that sees nothing, and logsumexp [B, H, T] of the scores, for such a
        query -inf.
    """
    scores = _scores(query, key, mask, diagonal, scale)
    logsumexp = scores.logsumexp(-1)
    p = (scores - logsumexp[..., None]).exp().masked_fill(logsumexp[..., None] == -math.inf, 0)
    return p @ _of_all_heads(value, query).to(p.dtype), logsumexp


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
) -> tuple[Tensor, Tensor]:
    """What the backward pass of scaled dot product attention needs of its softmax, in fp32 (float64 for float64).

    Args:
        query: [B, H, T, D]. key: [B, H / group, S, D]. value: [B, H / group, S, Dv].
        output, grad_output: [B, H, T, Dv].
        logsumexp: [B, H, T], of scale * query key^T + mask; -inf for a query that sees nothing.
        mask: broadcast to [B, H, T, S]; bool, False hides a key, or what is added to the scores.
        diagonal: query t sees keys up to t + diagonal; None: all.

    Returns:
        p = exp(scale * query key^T + mask - logsumexp), the weights, and
        ds = p * (grad_output value^T - sum(output * grad_output)) * scale, the gradient of query key^T; [B, H, T, S].
    """
    scores = _scores(query, key, mask, diagonal, scale)
    value, output, grad_output = (x.to(scores.dtype) for x in (value, output, grad_output))
    blind = logsumexp[..., None] == -math.inf
    p = (scores - logsumexp[..., None]).exp().masked_fill(blind, 0)
    delta = (output * grad_output).sum(-1, keepdim=True)
    return p, p * (grad_output @ _of_all_heads(value, query).mT - delta) * scale


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, diagonal: int | None, scale: float) -> Tensor:
    """scale * query key^T + mask, -inf where a key is hidden."""
    kind = torch.promote_types(query.dtype, torch.float32)
    scores = scale * query.to(kind) @ _of_all_heads(key, query).to(kind).mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if diagonal is not None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(diagonal)
        scores = scores.masked_fill(~seen, -math.inf)
    return scores


def _of_all_heads(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    slot: int,
    scale: float,
) -> Tensor:
    """Attention of one new token of each row over the slots of a cache, in which its key and value take `slot`.

    Args:
        query: [B, H, D]. key, value: [B, H / group, D].
        table: cos and sin [B, D] of the rotary embedding (see `nybble.nn.fused.rotary`); None: no rotation.
        keys, values: [B, H / group, slots, D]; the rotated key and the value are written there, rounded to their dtype.
        first: int64 [B], the first slot that each row sees; it sees all up to `slot`.

    Returns:
        fp32 [B, H, D].
    """

    def rotated(x: Tensor) -> Tensor:
        if table is None:
            return x.float()
        cos, sin = (t.float()[:, None] for t in table)
        one, two = x.float().chunk(2, -1)
        return x.float() * cos + torch.cat([-two, one], -1) * sin

    keys[:, :, slot], values[:, :, slot] = rotated(key).to(keys.dtype), value.to(values.dtype)
    group = query.shape[1] // key.shape[1]
    own_keys, own_values = (x[:, :, : slot + 1].float().repeat_interleave(group, 1) for x in (keys, values))
    scores = (own_keys @ rotated(query)[..., None])[..., 0] * scale
    hidden = torch.arange(slot + 1, device=first.device) < first[:, None]
    p = scores.masked_fill(hidden[:, None], -math.inf).softmax(-1)
    return (p[..., None, :] @ own_values)[..., 0, :]
