"""Checkpoints on disk: quantizing, loading, and adapters in PEFT's layout."""

from __future__ import annotations

from .load import load
from .peft import load_adapter, save_adapter
from .report import CheckpointReport, TensorReport
from .stream import quantize
from .writer import StorageFullError

__all__ = [
    "CheckpointReport",
    "StorageFullError",
    "TensorReport",
    "load",
    "load_adapter",
    "quantize",
    "save_adapter",
]
