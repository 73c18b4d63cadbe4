"""What quantizing a checkpoint did: figures per tensor and in all, and the closing table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TensorReport:
    """One quantized weight: bits per weight of its codes and scales, and ||W - Wq|| / ||W|| (Frobenius norms)."""

    name: str
    shape: tuple[int, ...]
    format: str
    block_size: int
    bits_per_weight: float
    relative_error: float

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass
class CheckpointReport:
    """Returned by `nybble.quantize`.

    `parameters` counts the elements of every tensor in the source; `bytes_before` and `bytes_after` are tensor data
    (without config and tokenizer files); `notes` are sentences worth a reader's attention.
    """

    source: Path
    destination: Path
    parameters: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    shards: list[str] = field(default_factory=list)
    tensors: list[TensorReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def quantized_parameters(self) -> int:
        return sum(row.numel for row in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Over the quantized weights: their codes and scales."""
        return self._mean([row.bits_per_weight for row in self.tensors])

    @property
    def bits_per_weight_total(self) -> float:
        """Over the whole checkpoint, embeddings, norms and maps included."""
        return 8 * self.bytes_after / self.parameters if self.parameters else 0.0

    @property
    def mean_relative_error(self) -> float:
        """The tensors' relative errors, averaged with their sizes as weights."""
        return self._mean([row.relative_error for row in self.tensors])

    def _mean(self, values: list[float]) -> float:
        total = self.quantized_parameters
        return sum(v * row.numel for v, row in zip(values, self.tensors, strict=True)) / total if total else 0.0

    def table(self) -> Table:
        """The closing table, for `rich.print`."""
        from rich.table import Table

        table = Table(show_header=False)
        table.add_column("what")
        table.add_column("value", justify="right")
        share = self.quantized_parameters / self.parameters if self.parameters else 0.0
        formats = sorted({row.format for row in self.tensors})
        table.add_row("parameters", f"{self.parameters:,}")
        table.add_row("quantized", f"{self.quantized_parameters:,} ({share:.1%}) in {len(self.tensors)} weights")
        table.add_row("format", ", ".join(formats) or "-")
        table.add_row("bits per weight, quantized", f"{self.bits_per_weight:.3f}")
        table.add_row("bits per weight, all", f"{self.bits_per_weight_total:.3f}")
        table.add_row("size before", format_bytes(self.bytes_before))
        table.add_row("size after", format_bytes(self.bytes_after))
        table.add_row("mean relative error", f"{self.mean_relative_error:.4f}")
        return table


def format_bytes(count: float) -> str:
    """A byte count for people, in decimal units as file managers and `max_shard_size` use them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
