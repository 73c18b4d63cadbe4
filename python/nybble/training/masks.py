"""Attention within the documents of a row: what a decoder is passed so that they do not see each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .data.rows import Batch
from .evaluating import evaluating

ADVICE = "use packing='none' or 'stream', or another attention"
_LAYER_TYPES = ("full_attention", "sliding_attention")


def document_mask(documents: Tensor, window: int | None = None) -> Tensor:
    """bool [B, 1, T, T], True where query t may see key s: s <= t, of the same document, and t - s < window if given.

    documents: int64 [B, T]. Padding sees padding, so that no row of a softmax is empty.
    """
    place = torch.arange(documents.shape[1], device=documents.device)
    distance = place[:, None] - place
    allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return ((documents[:, :, None] == documents[:, None, :]) & allowed)[:, None]


class DocumentAttention:
    """Keyword arguments by which a transformers decoder keeps documents apart, and proof that it does.

    A 4-D mask is used by transformers as it is, in every layer. So a model's sliding window must be in it; a model with
    layers of both kinds takes one mask for each kind. Eager attention adds its mask to the scores instead of reading it
    as True or False.
    """

    def __init__(self, run: nn.Module, forward: Callable[..., Tensor]) -> None:
        """run: the module that the arguments are for, with its configuration. forward: (ids, **them) -> [B, T, any]."""
        self.run = run
        self.forward = forward
        config: Any = getattr(run, "config", None)
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._proven: set[type] = set()

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """attention_mask and position_ids for a batch; none where every row is one document.

        Raises:
            ValueError: the model cannot keep documents of a row apart; says why and what to use instead.
        """
        if batch.documents is None or batch.positions is None:
            return {}
        mask = self._mask(batch.documents, int(batch.positions.max()) + 1)
        if type(mask) not in self._proven:
            self._prove(batch, by_kind=isinstance(mask, dict))
            self._proven.add(type(mask))
        return {"attention_mask": mask, "position_ids": batch.positions}

    def _mask(self, documents: Tensor, longest: int, by_kind: bool = False) -> Any:
        """One mask, or one for each kind of layer where documents are longer than the window of some layers alone."""
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if other := sorted(kinds - set(_LAYER_TYPES)):
            raise ValueError(
                f"{self._name} has layers of {', '.join(other)}, which cannot keep documents of a row apart; {ADVICE}"
            )
        window: int | None = getattr(self.config, "sliding_window", None)
        binds = window is not None and longest > window and (not kinds or "sliding_attention" in kinds)
        if by_kind or (binds and len(kinds) > 1):
            return {"full_attention": self._form(documents), "sliding_attention": self._form(documents, window)}
        return self._form(documents, window if binds else None)

    def _form(self, documents: Tensor, window: int | None = None) -> Tensor:
        """The mask as the model's attention takes it."""
        mask = document_mask(documents, window)
        attention = getattr(self.config, "_attn_implementation", None) or "sdpa"
        kind = attention.removeprefix("nybble_")  # a prefix's attention takes what the one under it takes
        if kind == "sdpa":
            return mask
        if kind == "eager":
            return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, torch.finfo(torch.float32).min)
        raise ValueError(
            f"{self._name} runs with attn_implementation={attention!r}, which takes no mask of documents; load it with "
            "attn_implementation='sdpa', or use packing='none' or 'stream'"
        )

    @property
    def _name(self) -> str:
        return f"packing='documents': {type(self.run).__name__}"

    @torch.no_grad()
    def _prove(self, batch: Batch, by_kind: bool) -> None:
        """Run two short documents in one row and raise ValueError unless the second is as without the first."""
        weight = next(self.run.parameters(), None)
        device = batch.ids.device if weight is None else weight.device
        documents = torch.tensor([0, 0, 0, 1, 1, 1], device=device).expand(len(batch), 6)
        arguments = {
            "attention_mask": self._mask(documents, 3, by_kind),
            "position_ids": torch.tensor([0, 1, 2, 0, 1, 2], device=device).expand(len(batch), 6),
        }
        vocabulary = getattr(self.config, "vocab_size", None) or int(batch.ids.max()) + 1
        with evaluating(self.run):
            ids = torch.arange(6, device=device).expand(len(batch), 6) % vocabulary
            others = torch.cat([ids[:, :3] + 6, ids[:, 3:]], dim=1) % vocabulary
            swapped = ids.roll(3, dims=1)
            try:
                first, second, leading = (self.forward(x, **arguments).float() for x in (ids, others, swapped))
            except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
                raise ValueError(
                    f"{self._name} does not take attention_mask and position_ids for several documents in a row "
                    f"({type(error).__name__}: {str(error)[:200]}); use packing='none' or 'stream'"
                ) from error
        changed = (first - second).abs()
        # A document's own change is the measure: what rounding leaves of another's is a 256th of it in bf16.
        if changed[:, 3:].max() > 0.02 * changed[:, :3].max():
            raise ValueError(f"{self._name} lets documents of a row see each other in spite of their mask; {ADVICE}")
        # The first token of a document, which sees itself alone, so that nothing but its position could differ; in rows
        # of one length, so that kernels round alike. What comes later adds up in another order, which a trained model
        # in bf16 has enlarged to 7% of its largest value.
        if (first[:, 3] - leading[:, 0]).abs().max() > 0.02 * leading[:, 0].abs().max():
            raise ValueError(f"{self._name} does not restart positions with every document of a row; {ADVICE}")
