"""Classification of texts: a head over an encoder or a decoder, its loss and its accuracy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.lean_products import lean_products
from .data.labelled import Labelled, LabelledBatch
from .distributed.world import ALONE, World
from .evaluating import evaluating

POOLINGS = ("mean", "cls", "last")


class TextClassifier(nn.Module):
    """(ids, attention_mask) -> logits [B, classes]: a transformers encoder or decoder, pooled, and a linear head.

    Attributes:
        encoder: gives last_hidden_state [B, T, hidden]; adapters are put on it.
        head: nn.Linear(hidden, classes), fp32 and computed in fp32, zero at the start so that every class is equally
            likely.
        pooling: "mean" over the tokens that are no padding, "cls" (the first of them) or "last" (the last of them,
            which is the one that has seen the whole text in a decoder).
    """

    def __init__(self, encoder: nn.Module, classes: int, pooling: str = "mean") -> None:
        """Raises ValueError or TypeError, naming the argument."""
        super().__init__()
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
            raise ValueError(f"classes must be an integer of at least 2, got {classes!r}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(map(repr, POOLINGS))}, got {pooling!r}")
        config: Any = getattr(encoder, "config", None)
        hidden = getattr(config, "hidden_size", None)
        if not isinstance(hidden, int):
            raise TypeError(
                f"encoder must be a transformers model with config.hidden_size, got {type(encoder).__name__}"
            )
        self.encoder = encoder
        self.config = config
        self.classes = classes
        self.pooling = pooling
        weight = next(encoder.parameters(), None)
        self.head = nn.Linear(hidden, classes, device=None if weight is None else weight.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """ids int64 [B, T]; attention_mask [B, T], 0 or False in padding; None: there is none."""
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=ids, attention_mask=mask.long(), **types).last_hidden_state
        pooled = self._pool(hidden, mask.bool())
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled)

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """fp32 [B, hidden]."""
        if self.pooling == "mean":
            counts = mask.sum(1, keepdim=True).clamp(min=1)
            return (hidden.float() * mask[..., None]).sum(1) / counts
        place = torch.arange(mask.shape[1], device=mask.device)
        token = mask.int().argmax(1) if self.pooling == "cls" else torch.where(mask, place, 0).amax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), token].float()

    def freeze_encoder(self) -> TextClassifier:
        """Linear probing: only the head is trained from now on (and adapters that are put on the encoder later)."""
        self.encoder.requires_grad_(False)
        return self


class ClassificationLoss:
    """Callable: LabelledBatch -> fp32 sum of the cross-entropy, for a model that gives logits [B, classes]."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, batch: LabelledBatch) -> Tensor:
        return F.cross_entropy(class_logits(self.model, batch), batch.labels, reduction="sum")


def class_logits(model: nn.Module, batch: LabelledBatch) -> Tensor:
    """fp32 [B, classes], whether the model returns a tensor or transformers' output object.

    Raises:
        ValueError: the logits are not [B, classes], or a label is no class of theirs.
    """
    types = {} if batch.types is None else {"token_type_ids": batch.types}
    output = model(batch.ids, attention_mask=batch.mask, **types)
    logits = output if isinstance(output, Tensor) else output.logits
    if logits.dim() != 2 or len(logits) != len(batch):
        raise ValueError(f"logits must be [{len(batch)}, classes], got {list(logits.shape)}; is it a classifier?")
    if len(batch) and int(batch.labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels run to class {int(batch.labels.max())}, the model has {logits.shape[1]} classes")
    return logits.float()


class Accuracy(NamedTuple):
    """Share of texts whose likeliest class is theirs, and the mean cross-entropy in nats."""

    accuracy: float
    loss: float


def accuracy(model: nn.Module, data: Labelled, batch_size: int = 32, world: World = ALONE) -> Accuracy:
    """Over all texts, in eval mode and without gradients; texts of like length go together, which saves padding.

    world: the processes among which every batch is divided.
    """
    if not len(data):
        raise ValueError("data is empty; there is nothing to measure")
    device = next(model.parameters()).device
    correct, total = 0, 0.0
    with evaluating(model), lean_products(), torch.no_grad():
        for indices in data.starts.diff().argsort(stable=True).split(batch_size):
            batch = data.take(indices)
            own = world.rows(len(batch))
            # As in `evaluate.mean_loss`: a process without a text of its own takes part with another's.
            batch = (batch.part(own.start, own.stop) if own else batch.part(0, 1)).to(device)
            logits = world.run(class_logits, model, batch)
            if own:
                correct += int((logits.argmax(1) == batch.labels).sum())
                total += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
    return Accuracy(world.sum_of(correct) / len(data), world.sum_of(total) / len(data))
