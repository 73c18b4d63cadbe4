"""How FSDP2 cuts a parameter: which rows of it, and of what the optimizer keeps of it, each process has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A parameter of `shape` in `processes` parts of equal numbers of rows; the last ones may be smaller or empty.

    block_size: elements that share a scale in 8-bit moments.
    """

    shape: tuple[int, ...]
    processes: int
    block_size: int = 256

    def rows(self, rank: int) -> range:
        """The rows that a process has: of dimension 0."""
        count = self.shape[0]
        each = -(-count // self.processes)
        return range(min(rank * each, count), min((rank + 1) * each, count))

    @property
    def row(self) -> int:
        """Elements of a row."""
        result = 1
        for size in self.shape[1:]:
            result *= size
        return result

    @property
    def blocks_are_whole(self) -> bool:
        """Whether blocks of elements that begin anew in every part are those of the whole parameter."""
        return self.processes == 1 or len(self.rows(0)) * self.row % self.block_size == 0

    def sizes(self, tensor: Tensor, rank: int) -> list[int] | None:
        """How many rows of a tensor each process has: the parameter, a moment of it, or the scales of its blocks.

        tensor: the part of process `rank`. None: it is the same everywhere.
        """
        own = (len(self.rows(rank)), *self.shape[1:])
        if tuple(tensor.shape) == own:
            return [len(self.rows(other)) for other in range(self.processes)]
        return [self._blocks(other) for other in range(self.processes)] if tensor.dim() == 1 else None

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """A copy of what a process has of the parameter, of a moment, or of scales; all of anything else."""
        if tuple(whole.shape) == self.shape:
            rows = self.rows(rank)
            return whole[rows.start : rows.stop].clone()
        if whole.dim() == 1:
            start = sum(self._blocks(other) for other in range(rank))
            return whole[start : start + self._blocks(rank)].clone()
        return whole

    def _blocks(self, rank: int) -> int:
        return -(-len(self.rows(rank)) * self.row // self.block_size)
