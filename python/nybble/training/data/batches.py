"""The endless stream of training rows, a function of the seed and the position alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .rows import Batch, Rows


def stream_indices(count: int, seed: int, position: int, number: int) -> list[int]:
    """Which of `count` rows stand at position to position + number - 1 of the stream: a new permutation each epoch."""
    indices = []
    for place in range(position, position + number):
        epoch, offset = divmod(place, count)
        indices.append(int(_permutation(count, seed, epoch)[offset]))
    return indices


@lru_cache(maxsize=16)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(count, generator=generator)


@dataclass(frozen=True)
class Batches:
    """The endless stream of training rows: a new permutation each epoch, a function of (seed, position) alone.

    Position, not batch, decides what a row is, so batch_size and grad_accum only group the same stream.
    """

    rows: Rows
    seed: int

    def at(self, position: int, count: int) -> Batch:
        """Rows number position to position + count - 1 of the stream."""
        return self.rows.take(stream_indices(len(self.rows), self.seed, position, count))


@dataclass(frozen=True)
class MixedBatches:
    """Several streams side by side, by the name of the adapter that is trained on each.

    The rows of a name are those of its own `Batches` at the same position, so it sees what a run of its own would.
    """

    streams: Mapping[str, Batches]

    def __post_init__(self) -> None:
        if not self.streams:
            raise ValueError("streams is empty; give the Batches of at least one adapter")

    def at(self, position: int, count: int) -> tuple[Batch, list[str]]:
        """(count rows of every stream, stream after stream; the name that each row belongs to)."""
        batch = Batch.join([stream.at(position, count) for stream in self.streams.values()])
        return batch, [name for name in self.streams for _ in range(count)]
