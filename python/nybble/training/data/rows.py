"""Rows of training tokens, as they are stored, and a batch of them, as a model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

IGNORE = -100
"""Targets of this value are not predicted and do not count."""
PADDING = -1
"""Number of the document that padding belongs to."""


@dataclass(frozen=True)
class Batch:
    """Rows as a causal model is trained on them.

    Attributes:
        ids: int64 [B, T].
        targets: int64 [B, T]; targets[i, t] is the token to predict at ids[i, t], IGNORE where nothing is.
        positions: int64 [B, T], restarting at 0 with every document; None: 0 to T - 1 in every row.
        documents: int64 [B, T], number of the document within its row, PADDING after the last; None: a row is one
            document (padding at its right changes nothing for a causal model, and is not counted).
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor | None = None
    documents: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def counted(self) -> int:
        """Number of targets that count."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        fields = (self.ids, self.targets, self.positions, self.documents)
        return Batch(*(None if field is None else field.to(device) for field in fields))  # type: ignore[arg-type]

    def part(self, start: int, stop: int) -> Batch:
        """Rows number start to stop - 1."""
        fields = (self.ids, self.targets, self.positions, self.documents)
        return Batch(*(None if field is None else field[start:stop] for field in fields))  # type: ignore[arg-type]

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """The rows of several batches in one, padded at the right to the longest.

        Raises:
            ValueError: there is no batch.
        """
        if not batches:
            raise ValueError("batches is empty; at least one is needed")
        length = max(batch.ids.shape[1] for batch in batches)
        if any(batch.documents is not None for batch in batches):
            batches = [batch._numbered() for batch in batches]
        return Batch(
            _join([batch.ids for batch in batches], length, 0),
            _join([batch.targets for batch in batches], length, IGNORE),
            None if batches[0].positions is None else _join([b.positions for b in batches], length, 0),
            None if batches[0].documents is None else _join([b.documents for b in batches], length, PADDING),
        )

    def _numbered(self) -> Batch:
        """The same with explicit positions and documents."""
        if self.documents is not None:
            return self
        positions = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        return replace(self, positions=positions, documents=torch.zeros_like(self.ids))


def _join(parts: Sequence[Tensor | None], length: int, value: int) -> Tensor:
    return torch.cat([pad(part, (0, length - part.shape[1]), value=value) for part in parts if part is not None])


@dataclass(frozen=True)
class Rows:
    """Rows of tokens on the CPU: the fields of `Batch` for [n, T], int32 or int64.

    Every row has a target that counts; documents fill a row from the left.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor | None = None
    documents: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.dim() != 2:
            raise ValueError(f"ids must be [rows, length], got {list(self.ids.shape)}")
        if (self.positions is None) != (self.documents is None):
            raise ValueError("positions and documents must both be given, or neither")
        for name in ("targets", "positions", "documents"):
            field = getattr(self, name)
            if field is not None and field.shape != self.ids.shape:
                raise ValueError(f"{name} must have the shape of ids, {list(self.ids.shape)}, got {list(field.shape)}")

    @staticmethod
    def windows(tokens: Tensor) -> Rows:
        """Plain windows [n, T + 1]: every token of a row but its first is predicted from those before it."""
        return Rows(tokens[:, :-1], tokens[:, 1:])

    def __len__(self) -> int:
        return self.ids.shape[0]

    @cached_property
    def counted(self) -> Tensor:
        """int64 [n]: number of targets of each row that count."""
        return (self.targets != IGNORE).sum(1)

    @cached_property
    def _lengths(self) -> Tensor:
        """int64 [n]: tokens up to the last target that counts; what follows has no influence on any."""
        columns = torch.arange(1, self.ids.shape[1] + 1)
        return torch.where(self.targets != IGNORE, columns, 0).amax(1)

    @cached_property
    def _mixed(self) -> Tensor:
        """bool [n]: the row has several documents."""
        return torch.zeros(len(self), dtype=torch.bool) if self.documents is None else self.documents.amax(1) > 0

    def part(self, start: int, stop: int) -> Rows:
        """Rows number start to stop - 1."""
        fields = (self.ids, self.targets, self.positions, self.documents)
        return Rows(*(None if field is None else field[start:stop] for field in fields))  # type: ignore[arg-type]

    def take(self, indices: Sequence[int] | Tensor) -> Batch:
        """The rows of these numbers, cut after the last target that counts.

        Where each of them is one document, `positions` and `documents` are None, so that no attention mask is needed.
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        length = max(1, int(self._lengths[index].max()))
        mixed = bool(self._mixed[index].any())

        def field(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index, :length].to(torch.int64)

        ids, targets = field(self.ids), field(self.targets)
        assert ids is not None and targets is not None
        return Batch(ids, targets, field(self.positions), field(self.documents)) if mixed else Batch(ids, targets)
