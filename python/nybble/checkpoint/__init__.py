"""Checkpoints on disk: quantizing, loading, and adapters in PEFT's layout."""

from __future__ import annotations

from .combine import combine_adapters
from .into import load_into
from .load import load
from .merge_report import MergeReport
from .merging import merge, unmerge
from .peft import load_adapter, save_adapter
from .report import CheckpointReport, TensorReport
from .stream import quantize
from .writer import StorageFullError

__all__ = [
    "CheckpointReport",
    "MergeReport",
    "StorageFullError",
    "TensorReport",
    "combine_adapters",
    "load",
    "load_adapter",
    "load_into",
    "merge",
    "quantize",
    "save_adapter",
    "unmerge",
]
