"""Tensors out of the shards of a checkpoint, as they lie in the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .files import TORCH_DTYPES, Source


class Reader:
    """Tensors of a source by name, each shard opened once."""

    def __init__(self, source: Source, device: str | torch.device) -> None:
        self.source, self._device = source, torch.device(device)
        self._handles: dict[Path, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._handles.clear()

    def __call__(self, name: str) -> Tensor:
        info = self.source.tensors[name]
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{info.path}: tensor {name!r} has dtype {info.dtype}, which the model cannot use")
        try:
            if info.path not in self._handles:
                self._handles[info.path] = safe_open(info.path, framework="pt")
            tensor: Tensor = self._handles[info.path].get_tensor(name)
        except SafetensorError as error:  # the library's own reading of the header, which may be stricter than ours
            raise CheckpointError(f"{info.path}: tensor {name!r}: safetensors cannot read it ({error})") from error
        return tensor.to(self._device)

    def where(self, name: str) -> str:
        return f"{self.source.tensors[name].path}: tensor {name!r}"
