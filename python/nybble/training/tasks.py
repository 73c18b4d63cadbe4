"""What the loop trains on: batches by their place in an endless stream, the loss of one, the held-out loss.

A task has groups: the adapters that are trained side by side, or the one group None. Each group's loss is the mean over
its own targets, so that it sees what it would see alone.

Of several processes, each takes its part of every batch (`World.rows`) out of the whole one: what a batch is padded to
and whether it has a mask is then the same in all of them, and they run through the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..nn.adapters import use_adapter
from .classifier import ClassificationLoss, accuracy
from .config import TrainConfig
from .data import IGNORE, Batch, Batches, Labelled, MixedBatches, Rows
from .distributed.world import ALONE, World
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

    def prepare(self) -> None:
        """What must be found out with the model, before the first batch."""

    def batch(self, position: int, count: int, device: torch.device) -> Any:
        """Of rows number position to position + count - 1 of every group's stream, those of this process."""

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

    def __init__(
        self, model: nn.Module, rows: Rows, held_out: Rows | None, config: TrainConfig, world: World = ALONE
    ) -> None:
        self.model, self.rows, self.held_out, self.config, self.world = model, rows, held_out, config, world
        self.sequences, self.has_held_out = len(rows), held_out is not None
        self._batches = Batches(rows, config.seed)

    @cached_property
    def _loss(self) -> CausalLoss:
        return CausalLoss(self.model, self.config.loss_chunk)

    def prepare(self) -> None:
        _ = self._loss  # runs the model on a few tokens

    def batch(self, position: int, count: int, device: torch.device) -> Any:
        own = self.world.rows(count)
        return self._batches.at(position, count).part(own.start, own.stop).to(device)

    def counted(self, batch: Any) -> Tensor:
        return torch.tensor([batch.counted])

    def losses(self, batch: Any) -> Tensor:
        return torch.stack([self._loss(batch)])  # no view of it, of which FSDP2 warns

    def acting(self, batch: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def evaluate(self) -> tuple[float, float | None] | None:
        if self.held_out is None:
            return None
        return mean_loss(
            self.model, self.held_out, batch_size=self.config.batch_size, loss=self._loss, world=self.world
        ), None

    def tensors(self) -> Iterable[Tensor | None]:
        for rows in (self.rows, self.held_out):
            if rows is not None:
                yield from (rows.ids, rows.targets, rows.positions, rows.documents)


class MixedTask:
    """Next-token prediction with several adapters in one batch, each on data of its own."""

    def __init__(
        self,
        model: nn.Module,
        rows: Mapping[str, Rows],
        held_out: Mapping[str, Rows | None],
        config: TrainConfig,
        world: World = ALONE,
    ) -> None:
        self.model, self.rows, self.held_out, self.config, self.world = model, rows, held_out, config, world
        self.groups: tuple[str | None, ...] = tuple(rows)
        self.sequences = max(len(r) for r in rows.values())
        self.has_held_out = any(r is not None for r in held_out.values())
        self._batches = MixedBatches({name: Batches(r, config.seed) for name, r in rows.items()})

    @cached_property
    def _loss(self) -> CausalLoss:
        return CausalLoss(self.model, self.config.loss_chunk)

    def prepare(self) -> None:
        _ = self._loss  # runs the model on a few tokens

    def batch(self, position: int, count: int, device: torch.device) -> Any:
        batch, names = self._batches.at(position, count)
        own = self.world.rows(count)
        firsts = range(0, len(batch), count)  # of every group
        parts = [batch.part(first + own.start, first + own.stop) for first in firsts]
        return Batch.join(parts).to(device), [names[first + i] for first in firsts for i in own]

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
                        mean_loss(
                            self.model, rows, batch_size=self.config.batch_size, loss=self._loss, world=self.world
                        )
                    )
        return (sum(losses) / len(losses), None) if losses else None

    def tensors(self) -> Iterable[Tensor | None]:
        for rows in (*self.rows.values(), *self.held_out.values()):
            if rows is not None:
                yield from (rows.ids, rows.targets, rows.positions, rows.documents)


class ClassificationTask:
    """A label for every text."""

    groups: tuple[str | None, ...] = (None,)

    def __init__(
        self, model: nn.Module, data: Labelled, held_out: Labelled | None, config: TrainConfig, world: World = ALONE
    ) -> None:
        self.model, self.data, self.held_out, self.config, self.world = model, data, held_out, config, world
        self.sequences, self.has_held_out = len(data), held_out is not None
        self._loss = ClassificationLoss(model)

    def prepare(self) -> None:
        """Nothing."""

    def batch(self, position: int, count: int, device: torch.device) -> Any:
        own = self.world.rows(count)
        return self.data.at(position, count).part(own.start, own.stop).to(device)

    def counted(self, batch: Any) -> Tensor:
        return torch.tensor([len(batch.labels)])

    def losses(self, batch: Any) -> Tensor:
        return torch.stack([self._loss(batch)])  # no view of it, of which FSDP2 warns

    def acting(self, batch: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def evaluate(self) -> tuple[float, float | None] | None:
        if self.held_out is None:
            return None
        found = accuracy(self.model, self.held_out, self.config.batch_size, self.world)
        return found.loss, found.accuracy

    def tensors(self) -> Iterable[Tensor | None]:
        for data in (self.data, self.held_out):
            if data is not None:
                yield from data.tensors()
