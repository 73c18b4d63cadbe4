"""A causal language model as its decoder and its head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.adapters import adapted_modules
from .evaluating import evaluating


def full_logits(model: nn.Module, input_ids: Tensor, **arguments: Any) -> Tensor:
    """model(input_ids) whether it returns a tensor or transformers' output object: [B, T, vocabulary]."""
    output = model(input_ids, **arguments)
    return output if isinstance(output, Tensor) else output.logits


def hidden_states(decoder: nn.Module, input_ids: Tensor, **arguments: Any) -> Tensor:
    """The decoder's last hidden states [B, T, hidden], without a key-value cache."""
    return decoder(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state


class AdjustedHead(nn.Module):
    """A head and what the model does to its logits: a factor or a soft cap."""

    def __init__(self, head: nn.Module, adjust: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head = head
        self.adjust = adjust

    def forward(self, hidden: Tensor) -> Tensor:
        return self.adjust(self.head(hidden))


def find_split(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """(decoder, head) of a transformers causal model, or None.

    Some models do more after the head than apply it (Gemma's soft cap, Cohere's and Granite's logit scale), so the
    split is tried on a few tokens, with what the configuration says of such, and taken only if it gives the model's own
    logits. Adapters on the decoder and on the head act as they would in the model.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    decoder = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    if get_head is None or not isinstance(decoder, nn.Module):
        return None
    head = get_head()
    if not isinstance(head, nn.Module):
        return None
    weight = next(decoder.parameters(), None)
    ids = torch.arange(4, device=None if weight is None else weight.device).expand(_rows(model), 4)
    with evaluating(model), torch.no_grad():
        expected = full_logits(model, ids).float()
        try:
            hidden = hidden_states(decoder, ids)
            for candidate in _candidates(model, head):
                found = candidate(hidden).float()
                if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
                    return decoder, candidate
        except (AttributeError, TypeError, RuntimeError):  # a decoder or head of another kind
            pass
    return None


def _rows(model: nn.Module) -> int:
    """Rows that a batch must have: those that adapters were chosen for, or any."""
    selections = (module.selection.rows for module in adapted_modules(model).values())
    return len(next(selections, None) or (None,))


def _candidates(model: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    """The head alone, and with what model families do to its logits by their configuration."""
    yield head
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        yield AdjustedHead(head, lambda logits: cap * torch.tanh(logits / cap))
    if factor := getattr(config, "logit_scale", None):
        yield AdjustedHead(head, lambda logits: logits * factor)
    if divisor := getattr(config, "logits_scaling", None):
        yield AdjustedHead(head, lambda logits: logits / divisor)
