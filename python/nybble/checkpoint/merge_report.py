"""What a merge did: figures per merged weight, and the closing table."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import format_bytes
from .writer import Staging

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class MergeRow:
    """One merged weight.

    Attributes:
        update: ||T - W|| / ||T||, where T is the exact sum. base_error: with `onto`, ||W0 - Wq|| / ||W0||, what the
            quantized base had lost of the original; else None. error: ||written - T|| / ||T||, None where T was only
            rounded to 16 or 32 bits. max_error: the largest |written - T|.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    rank: int
    update: float
    base_error: float | None = None
    error: float | None = None
    max_error: float | None = None


@dataclass
class MergeReport:
    """Returned by `nybble.merge`; `rows` are the weights that an adapter changed."""

    base: Path
    adapter: Path
    destination: Path
    rows: list[MergeRow] = field(default_factory=list)
    bytes_after: int = 0
    resumed: int = 0
    notes: list[str] = field(default_factory=list)
    perplexity: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON-able values."""
        return {
            "base": str(self.base),
            "adapter": str(self.adapter),
            "destination": str(self.destination),
            "bytes_after": self.bytes_after,
            "perplexity": self.perplexity,
            "notes": self.notes,
            "layers": [{**vars(row), "shape": list(row.shape)} for row in self.rows],
        }

    def write(self, path: Path) -> None:
        """Write the figures as JSON."""
        with Staging(path.parent) as staging:
            staging.write(path.name, (json.dumps(self.to_dict(), indent=2) + "\n").encode())
            staging.commit()

    def table(self) -> Table:
        """The closing table, for `rich.print`."""
        from rich.table import Table

        table = Table(show_header=False)
        table.add_column("what")
        table.add_column("value", justify="right")
        table.add_row("merged weights", f"{len(self.rows)}")
        table.add_row("format", ", ".join(sorted({row.format for row in self.rows})) or "-")
        for what, name in (
            ("mean update / weight", "update"),
            ("mean error of the quantized base", "base_error"),
            ("mean error after quantizing again", "error"),
        ):
            values = [value for row in self.rows if (value := getattr(row, name)) is not None]
            if values:
                table.add_row(what, f"{sum(values) / len(values):.4f} (largest {max(values):.4f})")
        table.add_row("size", format_bytes(self.bytes_after))
        for name, value in self.perplexity.items():
            table.add_row(f"perplexity, {name}", f"{value:.4f}")
        return table
