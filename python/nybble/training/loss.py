"""Cross-entropy of a causal language model without the [tokens, vocabulary] logits.

The hidden states of all tokens are computed first; then the head and the softmax run over a chunk of the tokens that
are predicted at a time, and their gradient is taken at once, while the chunk's logits exist. For 4,096 tokens of a
49,152-word vocabulary that is 50 MB of fp32 logits instead of 805 MB, and the head runs twice (forward, gradient), not
three times as it would with recomputation in the backward pass. After Liger Kernel's fused linear cross-entropy
(arXiv:2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .cross_entropy import chunked_cross_entropy
from .data.rows import IGNORE, Batch
from .masks import DocumentAttention
from .split import find_split, full_logits, hidden_states

__all__ = ["IGNORE", "CausalLoss", "chunked_cross_entropy", "find_split"]


class CausalLoss:
    """Callable: Batch -> fp32 sum of -log p over the targets that count.

    Uses the model's split into decoder and head where it has one that reproduces its logits, else its logits. Documents
    that share a row are kept apart by an attention mask, which is passed only if the batch has such rows. The head sees
    only the tokens whose next one is predicted.

    Raises ValueError, when called, for a batch with several documents in a row and a model that cannot keep them apart.
    """

    def __init__(self, model: nn.Module, chunk: int = 256) -> None:
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.model = model
        self.chunk = chunk
        self.split = find_split(model)
        if self.split is None:
            self._attention = DocumentAttention(model, self._logits)
        else:
            self._attention = DocumentAttention(self.split[0], self._hidden)

    def __call__(self, batch: Batch) -> Tensor:
        return self.of_hidden(self.hidden(batch), batch.targets)

    def hidden(self, batch: Batch) -> Tensor:
        """What the head is applied to: [B, T, hidden]; the logits [B, T, vocabulary] of a model without a split."""
        run = self._logits if self.split is None else self._hidden
        return run(batch.ids, **self._attention.arguments(batch))

    def of_hidden(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The loss, from `hidden` of a batch (or of some of its rows) and its targets [B, T]."""
        if self.split is not None:
            return chunked_cross_entropy(hidden.flatten(0, -2), self.split[1], targets.flatten(), self.chunk)
        counted = targets != IGNORE
        return F.cross_entropy(hidden[counted].float(), targets[counted], reduction="sum")

    def _hidden(self, ids: Tensor, **arguments: Any) -> Tensor:
        assert self.split is not None
        return hidden_states(self.split[0], ids, **arguments)

    def _logits(self, ids: Tensor, **arguments: Any) -> Tensor:
        return full_logits(self.model, ids, **arguments)
