"""Cross-entropy of a causal language model without the [tokens, vocabulary] logits.

The hidden states of all tokens are computed first; then the head and the softmax run over a chunk of tokens at a time,
and their gradient is taken at once, while the chunk's logits exist. For 4,096 tokens of a 49,152-word vocabulary that
is 50 MB of fp32 logits instead of 805 MB, and the head runs twice (forward, gradient), not three times as it would
with recomputation in the backward pass. After Liger Kernel's fused
linear cross-entropy (arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100
"""Targets of this value are not predicted and do not count."""


class CausalLoss:
    """Callable (input_ids [B, T], targets [B, T]) -> fp32 sum of -log p over the targets that are not IGNORE.

    Uses the model's split into decoder and head where it has one that reproduces its logits, else model(ids).logits.
    """

    def __init__(self, model: nn.Module, chunk: int = 256) -> None:
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.model = model
        self.chunk = chunk
        self.split = find_split(model)

    def __call__(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        if self.split is None:
            logits = full_logits(self.model, input_ids)
            return F.cross_entropy(
                logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum"
            )
        decoder, head = self.split
        hidden = hidden_states(decoder, input_ids)
        return chunked_cross_entropy(hidden.flatten(0, -2), head, targets.flatten(), self.chunk)


def full_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """model(input_ids) whether it returns a tensor or transformers' output object: [B, T, vocabulary]."""
    output = model(input_ids)
    return output if isinstance(output, Tensor) else output.logits


def hidden_states(decoder: nn.Module, input_ids: Tensor) -> Tensor:
    """The decoder's last hidden states [B, T, hidden], without a key-value cache."""
    return decoder(input_ids=input_ids, use_cache=False).last_hidden_state


def find_split(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """(decoder, head) of a transformers causal model, or None.

    Some models do more after the head than apply it (a soft cap, a logit scale), so the split is tried on a few tokens
    and taken only if it gives the model's own logits.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    decoder = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    if get_head is None or not isinstance(decoder, nn.Module):
        return None
    head = get_head()
    if not isinstance(head, nn.Module):
        return None
    weight = next(decoder.parameters(), None)
    ids = torch.arange(4, device=None if weight is None else weight.device)[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = full_logits(model, ids).float()
            try:
                found = head(hidden_states(decoder, ids)).float()
            except (AttributeError, TypeError, RuntimeError):  # a decoder or head of another kind
                return None
    finally:
        model.train(training)
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    return (decoder, head) if same else None


def chunked_cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor, chunk: int = 256) -> Tensor:
    """Sum of the cross-entropy of head(hidden) against targets, fp32, `chunk` tokens at a time.

    hidden: [tokens, hidden], any floating dtype; targets: int64 [tokens], IGNORE allowed. Gradients reach `hidden` and
    the head's trainable parameters.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be [tokens, hidden] and targets [tokens], got {list(hidden.shape)} and {list(targets.shape)}"
        )
    trainable = [p for p in head.parameters() if p.requires_grad]
    return _ChunkedCrossEntropy.apply(hidden, targets, head, chunk, *trainable)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], chunk: int, *parameters: Tensor
    ) -> Tensor:
        wanted = [hidden.requires_grad, *(p.requires_grad for p in parameters)]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_parameters = [torch.zeros_like(p) for p in parameters]
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            with torch.set_grad_enabled(any(wanted)):
                part = hidden[rows].detach().requires_grad_(wanted[0])
                logits = head(part)
            loss, grad_logits = _cross_entropy(logits.detach(), targets[rows])
            total += loss
            if not any(wanted):
                continue
            inputs = ([part] if wanted[0] else []) + list(parameters)
            grads = list(torch.autograd.grad(logits, inputs, grad_logits.to(logits.dtype)))
            if grad_hidden is not None:
                grad_hidden[rows] = grads.pop(0)
            for kept, grad in zip(grad_parameters, grads, strict=True):
                kept += grad
        ctx.save_for_backward(*([] if grad_hidden is None else [grad_hidden]), *grad_parameters)
        ctx.has_hidden = grad_hidden is not None
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = [g * grad.to(g.dtype) for g in ctx.saved_tensors]
        grad_hidden = saved.pop(0) if ctx.has_hidden else None
        return grad_hidden, None, None, None, *saved


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of -log p over the counted targets, its gradient with respect to the logits [tokens, vocabulary]), fp32.

    One fp32 buffer, turned from log p into the gradient in place; autograd's own path makes two more.
    """
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    counted = targets != IGNORE
    index = targets.where(counted, 0)[:, None]
    loss = -log_p.gather(1, index)[:, 0].where(counted, 0.0).sum()
    grad = log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1.0))
    return loss, grad.mul_(counted[:, None]) if not counted.all() else grad
