"""Modules that an adapter trains in full, in PEFT's files: `modules_to_save` and the tensors that it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn import LoRAEmbedding, LoRALinear, QuantLinear, TrainedCopy
from ..nn.add import put_copies
from ..nn.names import adapted_layers, base_modules
from .adapter import PREFIX, WEIGHTS_NAME
from .files import TensorInfo, read_tensor


def copies_to_save(model: nn.Module, adapter: str) -> dict[str, dict[str, Tensor]]:
    """Name of a module -> tensors by their name in the file: the adapter's copies, and modules of the model itself
    that train.

    Raises:
        ValueError: the model has trainable parameters that belong to none of its modules, or to a layer that the
            adapter updates: a copy loaded in its place would hide the update.
    """
    around = adapted_layers(model, (LoRALinear, LoRAEmbedding))
    updated = {name for name, layer in around.items() if adapter in layer.adapters}
    copies = {n: m for n, m in adapted_layers(model, (TrainedCopy,)).items() if adapter in m.adapters}
    result: dict[str, dict[str, Tensor]] = {}
    for name, _, module in base_modules(model):
        if name in result:
            continue
        if name in copies:
            values: Mapping[str, Any] = copies[name].copy_of(adapter).state_dict()
        elif any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            if not name:
                raise ValueError("model: it has trainable parameters of its own, which an adapter file cannot hold")
            if name in updated:
                raise ValueError(
                    f"model: {name} has an update by adapter {adapter!r}, and its own weight is trained too; an "
                    "adapter file cannot hold both: freeze the weight, or take the layer out of the adapter's target"
                )
            values = module.state_dict()
        else:
            continue
        result[name] = {f"{PREFIX}{name}.{key}": value for key, value in values.items()}
    return result


def plan_copies(
    model: nn.Module, directory: Path, named: str | list[str] | None, saved: Mapping[str, TensorInfo]
) -> dict[str, dict[str, TensorInfo]]:
    """{module: {name inside it: tensor}} of a file's full copies; those that only repeat the model's weights are left
    out: PEFT adds the embeddings when an adapter is on one, without naming them in `modules_to_save`.

    Args:
        named: `modules_to_save`. saved: the file's full tensors by their name in the model.

    Raises:
        CheckpointError: a tensor that does not fit, or that is no copy and not the model's own.
    """
    wanted = [named] if isinstance(named, str) else named or []
    for one in wanted:
        if not any(f".{one}." in f".{name}" for name in saved):
            raise CheckpointError(f"{directory / WEIGHTS_NAME}: no tensor of {one!r}, named in modules_to_save")
    modules = {name: module for name, _, module in base_modules(model)}
    result: dict[str, dict[str, TensorInfo]] = {}
    for name, info in saved.items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        copied = next((p for p in _prefixes(path) if any(f".{p}".endswith(f".{one}") for one in wanted)), None)
        shape = _shape(module, leaf, copied is not None)
        if shape is None:
            raise CheckpointError(f"{info.path}: tensor {info.name!r} is no adapter and cannot be loaded")
        if info.shape != shape:
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} has shape {list(info.shape)}, the model's has {list(shape)}"
            )
        if copied is not None:
            result.setdefault(copied, {})[name.removeprefix(f"{copied}.")] = info
            continue
        own: Any = getattr(module, leaf)
        if not torch.equal(read_tensor(info).to(own), own):
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} is not the model's, and modules_to_save does not name it"
            )
    return result


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _shape(module: nn.Module | None, leaf: str, copied: bool) -> tuple[int, ...] | None:
    """Of the tensor that a module has, or that a full copy of it would have; None if there is none."""
    if isinstance(module, QuantLinear):
        shapes = {"weight": (module.out_features, module.in_features)}
        if module.bias is not None:
            shapes["bias"] = (module.out_features,)  # type: ignore[assignment]  # tuples of any length
        return shapes.get(leaf) if copied else None
    own = getattr(module, leaf, None)
    return tuple(own.shape) if isinstance(own, Tensor) else None


def load_copies(model: nn.Module, adapter: str, plan: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Give an adapter its own copies of modules, with the values of a file: what `plan_copies` found."""
    for name, copied in put_copies(model, adapter, plan).items():
        own = {**dict(copied.named_buffers()), **dict(copied.named_parameters())}
        for inner, info in plan[name].items():
            own[inner].copy_(read_tensor(info))
