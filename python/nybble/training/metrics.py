"""What a run shows and writes while it goes on: metrics.jsonl, a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..checkpoint.writer import StorageFullError, full_disk_names, write_all


def peak_memory_bytes(device: torch.device | str = "cpu") -> int | None:
    """Most memory this process has held so far, in bytes: allocated by torch on a CUDA device, resident on the CPU.

    On "mps" torch counts no peak: what Metal holds for the process now, unused buffers that torch keeps included.
    The resident set counts file pages that are mapped, such as a checkpoint's. None where the platform cannot say.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if torch.device(device).type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory held now, in bytes, as `peak_memory_bytes` counts it; its peak where only that is known."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory_bytes("cpu")
    return pages * os.sysconf("SC_PAGE_SIZE")


def format_memory(count: int | None) -> str:
    """1_500_000_000 -> "1.50 GB"; None -> "unknown"."""
    from ..checkpoint.report import format_bytes

    return "unknown" if count is None else format_bytes(count)


class MetricsFile:
    """metrics.jsonl: one JSON object a line, on disk as soon as it is written; with `tensorboard` its files too.

    Args:
        path: the file; None: nothing is written.
        after: the step from which a run is taken up again: rows of later steps are dropped, and new ones follow.
        tensorboard: a directory for TensorBoard's files.

    Attributes:
        lost: rows that a full disk did not take; the file is whole without them.

    Raises:
        ImportError: tensorboard is wanted and not installed.
    """

    def __init__(self, path: Path | None, after: int | None = None, tensorboard: Path | None = None) -> None:
        self._board = None if tensorboard is None else _summary_writer(tensorboard, after)
        if path is not None and after is not None and path.exists():
            _keep_rows(path, after)
        self.path = path
        self.lost = 0
        # Unbuffered: what a full disk did not take must not be tried again by the next row, or by close().
        self._file: BinaryIO | None = None
        if path is not None:
            if after is None:
                path.unlink(missing_ok=True)
            self._file = path.open("ab", buffering=0)

    def write(self, kind: str, **values: Any) -> None:
        """Values that are not finite become null, which JSON has instead."""
        if self._file is not None:
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            self._append((json.dumps({"kind": kind, **row}, allow_nan=False) + "\n").encode())
        if self._board is not None and kind in ("step", "eval"):
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, values["step"])
            self._board.flush()

    def _append(self, line: bytes) -> None:
        assert self._file is not None
        before = os.fstat(self._file.fileno()).st_size
        try:
            with full_disk_names(self.path or Path()):
                write_all(self._file, line)
        except StorageFullError:  # a row less is no reason to end a run
            self.lost += 1
            os.ftruncate(self._file.fileno(), before)

    def sync(self) -> None:
        """Make the rows so far last."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None


def _keep_rows(path: Path, after: int) -> None:
    """Drop the rows of steps after `after`, and a last line that a killed process did not finish."""
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("step", 0) <= after:
            kept.append(line + "\n")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _summary_writer(directory: Path, after: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard=True needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(directory, purge_step=0 if after is None else after + 1)


class Display:
    """Loss, tokens/s, memory and time left: a live bar on a terminal, one line every log_every steps elsewhere."""

    def __init__(self, total_steps: int, log_every: int, enabled: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.total_steps = total_steps
        self.log_every = log_every
        self.enabled = enabled
        self._started = time.perf_counter()
        self._live = enabled and self.console.is_terminal
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console, disable=not self._live)
        self._task = self._progress.add_task("starting", total=total_steps)

    def __enter__(self) -> Display:
        self._started = time.perf_counter()
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def step(self, step: int, loss: float, tokens_per_second: float, memory: int | None) -> None:
        """After step number `step` (1 is the first)."""
        speed, held = f"{tokens_per_second:,.0f} tokens/s", format_memory(memory)
        text = f"step {step}/{self.total_steps}  loss {loss:.4f}  {speed}  {held}"
        if self._live:
            self._progress.update(self._task, completed=step, description=text)
        elif step == 1 or step % self.log_every == 0 or step == self.total_steps:
            left = (time.perf_counter() - self._started) / step * (self.total_steps - step)
            self.say(f"{text}  {left:,.0f} s left")

    def say(self, text: str) -> None:
        """One line of its own, above the bar if there is one."""
        if self.enabled:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
