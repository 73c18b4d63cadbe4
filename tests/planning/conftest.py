"""What tests of two checkpoints share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function (name, tensors) that writes a directory with model.safetensors, and a config.json if one is given."""

    def checkpoint(name: str, tensors: Mapping[str, torch.Tensor], config: str | None = None) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "model.safetensors")
        if config is not None:
            (directory / "config.json").write_text(config)
        return directory

    return checkpoint
