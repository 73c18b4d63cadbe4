"""What quantizing a checkpoint did: figures per tensor and in all, and the closing table."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .writer import Staging

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TensorReport:
    """One quantized weight.

    Attributes:
        bits_per_weight: of its codes and scales.
        relative_error: ||W - Wq|| / ||W|| in Frobenius norms, which is also the RMS of the error over that of W.
        max_error: the largest |W - Wq|.
        output_error, output_error_plain: of a calibrated weight: relative RMS error of the layer's outputs on the
            calibration text, and what it would be with the plain rule (absmax scales, nearest codes); None where no
            sample reached the layer.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    block_size: int
    bits_per_weight: float
    relative_error: float
    max_error: float = 0.0
    output_error: float | None = None
    output_error_plain: float | None = None

    @property
    def snr(self) -> float:
        """Signal to noise in dB; infinite without error."""
        return -20 * math.log10(self.relative_error) if self.relative_error else math.inf

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TensorReport:
        """The inverse of `to_dict`."""
        return cls(**{**values, "shape": tuple(values["shape"])})

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
    resumed: int = 0

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

    @property
    def mean_output_error(self) -> tuple[float, float] | None:
        """(plain rule, as written): the calibrated weights' output errors, averaged alike; None without calibration."""
        rows = [row for row in self.tensors if row.output_error is not None and row.output_error_plain is not None]
        if not rows:
            return None
        total = sum(row.numel for row in rows)
        plain = sum((row.output_error_plain or 0.0) * row.numel for row in rows)
        return plain / total, sum((row.output_error or 0.0) * row.numel for row in rows) / total

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
        if self.mean_output_error is not None:
            before, after = self.mean_output_error
            table.add_row("mean error of outputs, plain rule", f"{before:.4f}")
            table.add_row("mean error of outputs, calibrated", f"{after:.4f}")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON-able values; an infinite signal to noise ratio as None."""
        rows = [{**row.to_dict(), "snr_db": row.snr if math.isfinite(row.snr) else None} for row in self.tensors]
        return {
            "source": str(self.source),
            "destination": str(self.destination),
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_weight_total": self.bits_per_weight_total,
            "mean_relative_error": self.mean_relative_error,
            "notes": self.notes,
            "tensors": rows,
        }

    def write(self, path: Path) -> list[Path]:
        """Write the figures to `path` (JSON) and, with matplotlib, a plot beside it (.png); returns the files.

        Raises:
            ValueError: see `check_report_path`.
        """
        check_report_path(path)
        written = [path]
        with Staging(path.parent) as staging:
            staging.write(path.name, (json.dumps(self.to_dict(), indent=2) + "\n").encode())
            try:
                picture = _plot(self)
            except ImportError:
                self.notes.append("no plot beside the report: matplotlib is missing (pip install 'nybble[plot]')")
            else:
                written.append(path.with_suffix(".png"))
                staging.write(written[1].name, picture)
            staging.commit()
        return written


def check_report_path(path: Path) -> None:
    """Raises ValueError unless `path` can be a JSON file with a plot of another name beside it."""
    if path.is_dir() or not path.name:
        raise ValueError(f"report: {path} is a directory; the name of a JSON file is needed")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"report: {path} lies below {above}, which is a file")
    if path.suffix.lower() == ".png":
        raise ValueError(f"report: {path} is the name of the plot, which is put beside the figures; give a .json file")


def _plot(report: CheckpointReport) -> bytes:
    """Relative error and largest error of every weight, in file order, as a PNG."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name in sorted({row.format for row in report.tensors}):
        rows = [(at, row) for at, row in enumerate(report.tensors) if row.format == name]
        upper.plot([at for at, _ in rows], [row.relative_error for _, row in rows], ".", label=name)
        lower.plot([at for at, _ in rows], [row.max_error for _, row in rows], ".", label=name)
    upper.set_ylabel("relative RMS error")
    lower.set_ylabel("largest error")
    lower.set_xlabel("weight, in file order")
    upper.set_title(f"{report.destination.name}: {report.bits_per_weight:.3f} bits per weight")
    upper.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def format_bytes(count: float) -> str:
    """A byte count for people, in decimal units as file managers and `max_shard_size` use them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
