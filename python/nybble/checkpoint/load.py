"""Loading a checkpoint directory into a transformers model whose linear layers stay quantized.

This and `architecture` are the files that know transformers, which is imported on use (extra `hf`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..nn import mixture
from .architecture import Architecture, Names, describe, import_transformers, model_class, model_config, named, skeleton
from .bnb import group, source_quantization
from .files import Source, open_source
from .fusion import Fusion, find_fusions
from .placing import place_others, place_plain, place_quantized
from .shard_reader import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Architecture", "Fusion", "Names", "Reader", "describe", "find_fusions", "load", "skeleton"]


def load(
    directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a checkpoint directory as a transformers model in eval mode, its quantized weights as `QuantLinear`.

    The model is built without memory for its parameters; each tensor of the file then takes its place directly. On the
    CPU these are mapped from the file, so that loading is quick and processes share the pages. A directory without
    quantized weights loads as the ordinary model.

    Args:
        directory: written by `nybble.quantize`, by bitsandbytes through transformers, or plain.
        dtype: of the parameters that are not quantized; by default what config.json says.
        device: where the tensors go.

    Raises:
        ImportError: transformers is not installed.
        CheckpointError: a file is damaged, or its tensors do not fit the model: names them.
        CheckpointNotFoundError: a file is missing.
    """
    source = open_source(directory)
    if not source.is_directory:
        raise CheckpointError(f"{directory}: a directory with config.json is needed, this is a file")
    groups = group(source.tensors, str(directory))
    if not groups.quantized and not groups.others:
        return _load_plain(source, dtype, device)
    model = skeleton(source.root, dtype)
    names = Names(model)
    with Reader(source, device) as reader:
        place_quantized(model, names, groups, reader)
        place_others(model, names, groups, reader)
        place_plain(model, names, groups, reader)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
    _load_generation_config(model, source.root)
    model.config._name_or_path = str(directory)
    block = (source.config() or {}).get("quantization_config")
    if isinstance(block, dict):
        model.config.quantization_config = block  # for save_pretrained
    mixture.use(model)
    return model.eval()


def _load_plain(source: Source, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    method = source_quantization(source.config())
    if method is not None:
        raise CheckpointError(f"{source.root}: quantized by {method!r}, whose layout nybble does not read")
    config = model_config(source.root)
    cls = model_class(config, source.root)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with named(source.root), _quiet():
        model: nn.Module = cls.from_pretrained(
            str(source.root), dtype=dtype, local_files_only=True, use_safetensors=True
        )
    mixture.use(model)
    return model.to(device).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar: a library call prints nothing that was not asked for."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_generation_config(model: PreTrainedModel, directory: Path) -> None:
    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = import_transformers().GenerationConfig.from_pretrained(
            str(directory), local_files_only=True
        )
