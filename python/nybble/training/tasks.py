"""What the loop trains on: batches by their place in an endless stream, the loss of one, the held-out loss.

A task has groups: the adapters that are trained side by side, or the one group None. Each group's loss is the mean over
its own targets, so that it sees what it would see alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..nn.adapters import use_adapter
from .classifier import ClassificationLoss, accuracy
from .config import TrainConfig
from .data import IGNORE, Batches, Labelled, MixedBatches, Rows
from .evaluate import mean_loss
from .loss import CausalLoss


class Task(Protocol):
    """What the loop asks for.

    Attributes:
        groups: names of the adapters that are trained side by side; (None,) for whatever acts.
        sequences: rows of one epoch (of the largest group).
        has_held_out: whether `evaluate` has anything to evaluate.
    """

    groups: tuple[str | None, ...]
    sequences: int
    has_held_out: bool

    def batch(self, position: int, count: int, device: torch.device) -> Any:
        """Rows number position to position + count - 1 of every group's stream."""

    def counted(self, batch: Any) -> Tensor:
        """int64 [groups]: targets of the batch that count."""

    def losses(self, batch: Any) -> Tensor:
        """fp32 [groups]: summed loss over these targets."""

    def acting(self, batch: Any) -> AbstractContextManager[None]:
        """In which forward and backward run."""

    def evaluate(self) -> tuple[float, float | None] | None:
        """(mean held-out loss, accuracy if there is such a thing); None without held-out data."""

    def tensors(self) -> Iterable[Tensor | None]:
        """The data, for its fingerprint."""


class CausalTask:
    """Next-token prediction."""

    groups: tuple[str | None, ...] = (None,)

    def __init__(self, model: nn.Module, rows: Rows, held_out: Rows | None, config: TrainConfig) -> None:
        self.model, self.rows, self.held_out, self.config = model, rows, held_out, config
        self.sequences, self.has_held_out = len(rows), held_out is not None
        self._batches = Batches(rows, config.seed)
        self._loss = CausalLoss(model, config.loss_chunk)

    def batch(self, position: int, count: int, device: torch.device) -> Any:
        return self._batches.at(position, count).to(device)

    def counted(self, batch: Any) -> Tensor:
        return torch.tensor([batch.counted])

    def losses(self, batch: Any) -> Tensor:
        return self._loss(batch).reshape(1)

    def acting(self, batch: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def evaluate(self) -> tuple[float, float | None] | None:
        if self.held_out is None:
            return None
        return mean_loss(
            self.model, self.held_out, batch_size=self.config.batch_size, chunk=self.config.loss_chunk
        ), None

    def tensors(self) -> Iterable[Tensor | None]:
        for rows in (self.rows, self.held_out):
            if rows is not None:
                yield from (rows.ids, rows.targets, rows.positions, rows.documents)


class MixedTask:
    """Next-token prediction with several adapters in one batch, each on data of its own."""

    def __init__(
        self, model: nn.Module, rows: Mapping[str, Rows], held_out: Mapping[str, Rows | None], config: TrainConfig
    ) -> None:
        self.model, self.rows, self.held_out, self.config = model, rows, held_out, config
        self.groups: tuple[str | None, ...] = tuple(rows)
        self.sequences = max(len(r) for r in rows.values())
        self.has_held_out = any(r is not None for r in held_out.values())
        self._batches = MixedBatches({name: Batches(r, config.seed) for name, r in rows.items()})
        self._loss = CausalLoss(model, config.loss_chunk)

    def batch(self, position: int, count: int, device: torch.device) -> Any:
        batch, names = self._batches.at(position, count)
        return batch.to(device), names

    def counted(self, batch: Any) -> Tensor:
        return torch.stack([(targets != IGNORE).sum() for targets in self._split(batch[0].targets)]).cpu()

    def losses(self, batch: Any) -> Tensor:
        whole, _ = batch
        sums = []
        for name, hidden, targets in zip(
            self.groups, self._split(self._loss.hidden(whole)), self._split(whole.targets), strict=True
        ):
            # The head sees the tokens of one adapter's rows, one after the other.
            with use_adapter(self.model, name):
                sums.append(self._loss.of_hidden(hidden, targets))
        return torch.stack(sums)

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        """The rows of every group."""
        return values.chunk(len(self.groups))

    def acting(self, batch: Any) -> AbstractContextManager[None]:
        return use_adapter(self.model, batch[1])

    def evaluate(self) -> tuple[float, float | None] | None:
        losses = []
        for name, rows in self.held_out.items():
            if rows is not None:
                with use_adapter(self.model, name):
                    losses.append(
                        mean_loss(self.model, rows, batch_size=self.config.batch_size, chunk=self.config.loss_chunk)
                    )
        return (sum(losses) / len(losses), None) if losses else None

    def tensors(self) -> Iterable[Tensor | None]:
        for rows in (*self.rows.values(), *self.held_out.values()):
            if rows is not None:
                yield from (rows.ids, rows.targets, rows.positions, rows.documents)


class ClassificationTask:
    """A label for every text."""

    groups: tuple[str | None, ...] = (None,)

    def __init__(self, model: nn.Module, data: Labelled, held_out: Labelled | None, config: TrainConfig) -> None:
        self.model, self.data, self.held_out, self.config = model, data, held_out, config
        self.sequences, self.has_held_out = len(data), held_out is not None
        self._loss = ClassificationLoss(model)

    def batch(self, position: int, count: int, device: torch.device) -> Any:
        return self.data.at(position, count).to(device)

    def counted(self, batch: Any) -> Tensor:
        return torch.tensor([len(batch.labels)])

    def losses(self, batch: Any) -> Tensor:
        return self._loss(batch).reshape(1)

    def acting(self, batch: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def evaluate(self) -> tuple[float, float | None] | None:
        if self.held_out is None:
            return None
        found = accuracy(self.model, self.held_out, self.config.batch_size)
        return found.loss, found.accuracy

    def tensors(self) -> Iterable[Tensor | None]:
        for data in (self.data, self.held_out):
            if data is not None:
                yield from data.tensors()
