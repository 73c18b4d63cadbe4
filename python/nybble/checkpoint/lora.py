"""LoRA in PEFT's files, onto a model and from it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, PatternError
from ..nn import LoRAConfig, LoRAEmbedding, LoRALinear, QuantLinear, TrainedCopy
from ..nn.adapters import freeze_base
from ..nn.add import put_lora
from ..nn.factors import LoRA
from ..nn.names import adapted_layers, layers_of
from ..nn.quantize import read_directly
from .adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME, AdapterFile, AdapterLayer
from .copies import load_copies, plan_copies
from .files import read_tensor

_KINDS = (nn.Linear, QuantLinear, nn.Embedding)


def updates_of(model: nn.Module, adapter: str) -> dict[str, LoRA]:
    """The low-rank updates of an adapter by the names of their layers."""
    around = adapted_layers(model, (LoRALinear, LoRAEmbedding))
    return {name: layer.adapters[adapter] for name, layer in around.items() if adapter in layer.adapters}


# ---- saving ----------------------------------------------------------------------------------------------------------


def save_lora(model: nn.Module, adapter: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json's own part, tensors) of the low-rank updates of an adapter.

    Raises:
        ValueError: there is none, or some use rsLoRA or DoRA and some do not.
    """
    updates = updates_of(model, adapter)
    if not updates:
        raise ValueError(f"model: adapter {adapter!r} has no low-rank update, and its copies alone are none in PEFT")
    embeddings = _embeddings(model)
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        if name in embeddings:
            tensors[f"{PREFIX}{name}.lora_embedding_A"] = update.lora_A
            tensors[f"{PREFIX}{name}.lora_embedding_B"] = update.lora_B
            continue
        tensors[f"{PREFIX}{name}.lora_A.weight"] = update.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = update.lora_B
        if update.lora_magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = update.lora_magnitude
    linear = {name: update for name, update in updates.items() if name not in embeddings}
    r = Counter(update.r for update in updates.values()).most_common(1)[0][0]
    alpha = Counter(update.alpha for update in updates.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": max(update.dropout for update in updates.values()),
        "target_modules": _target_modules(model, updates),
        "exclude_modules": None,
        "bias": "none",
        "use_rslora": _same(updates, "rslora", "rsLoRA"),
        "use_dora": _same(linear, "dora", "DoRA"),
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {name: update.r for name, update in updates.items() if update.r != r},
        "alpha_pattern": {name: update.alpha for name, update in updates.items() if update.alpha != alpha},
        "fan_in_fan_out": False,
    }
    return config, tensors


def _embeddings(model: nn.Module) -> set[str]:
    return set(layers_of(model, (nn.Embedding,)))


def _same(updates: dict[str, LoRA], setting: str, shown: str) -> bool:
    """What all of them have for a setting that the file has once."""
    values = {getattr(update, setting) for update in updates.values()}
    if len(values) > 1:
        raise ValueError(
            f"model: some LoRA layers use {shown} and some do not; an adapter file has one setting for all"
        )
    return bool(values and values.pop())


def _target_modules(model: nn.Module, updates: dict[str, LoRA]) -> list[str]:
    """Last parts of the names where they mean exactly these layers, whole names where they do not."""
    taken = {name.rpartition(".")[2] for name in layers_of(model, _KINDS) if name not in updates}
    return sorted({name if (leaf := name.rpartition(".")[2]) in taken else leaf for name in updates})


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_lora(model: nn.Module, file: AdapterFile, adapter: str) -> None:
    """Put the updates and copies of a file on a model as the adapter of this name; see `nybble.load_adapter`."""
    layers = {name: layer for name, (_, layer) in layers_of(model, _KINDS).items()}
    _check_targets(model, file, layers)
    for layer in file.layers.values():
        _check_shape(layer, layers[layer.path])
    full = plan_copies(model, file.directory, file.settings["modules_to_save"], file.saved)
    present = updates_of(model, adapter)
    copied = [n for n, m in adapted_layers(model, (TrainedCopy,)).items() if adapter in m.adapters]
    if present or copied:
        _check_present(file, adapter, present, set(copied) - set(full))
    else:
        settings = file.settings
        config = LoRAConfig(
            r=settings["r"],
            alpha=settings["lora_alpha"],
            dropout=settings["lora_dropout"],
            rslora=settings["use_rslora"],
            dora=settings["use_dora"],
        )
        freeze_base(model)
        put_lora(model, adapter, {name: (layer.r, layer.alpha) for name, layer in file.layers.items()}, config)
        present = updates_of(model, adapter)
    for name, update in present.items():
        layer = file.layers[name]
        update.lora_A.copy_(read_tensor(layer.lora_A))
        update.lora_B.copy_(read_tensor(layer.lora_B))
        if layer.magnitude is not None and update.lora_magnitude is not None:
            update.lora_magnitude.copy_(read_tensor(layer.magnitude).reshape(-1))
    load_copies(model, adapter, full)


def _check_targets(model: nn.Module, file: AdapterFile, layers: dict[str, nn.Module]) -> None:
    targets = file.settings["target_modules"]
    for target in targets if isinstance(targets, list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise PatternError(
                f"{file.directory / CONFIG_NAME}: target_modules: {target!r} is no linear layer of the model"
            )
    direct = read_directly(model)
    for name, layer in file.layers.items():
        wanted = (nn.Embedding,) if layer.kind == "embedding" else (nn.Linear, QuantLinear)
        if type(layers.get(name)) not in wanted or name in direct:
            kind = "embedding" if layer.kind == "embedding" else "linear layer"
            raise PatternError(f"{file.directory / WEIGHTS_NAME}: the model has no {kind} {name!r}")


def _check_shape(layer: AdapterLayer, base: Any) -> None:
    if layer.kind == "embedding":
        if layer.magnitude is not None:
            raise CheckpointError(f"{layer.lora_A.path}: {layer.path}: DoRA of an embedding is not supported")
        rows, columns = base.num_embeddings, base.embedding_dim
        wants = ((layer.lora_A, [layer.r, rows]), (layer.lora_B, [columns, layer.r]))
    else:
        wants = ((layer.lora_A, [layer.r, base.in_features]), (layer.lora_B, [base.out_features, layer.r]))
    for info, want in wants:
        if list(info.shape) != want:
            raise CheckpointError(f"{info.path}: tensor {info.name!r} has shape {list(info.shape)}, not {want}")


def _check_present(file: AdapterFile, adapter: str, present: dict[str, LoRA], copied: set[str]) -> None:
    """Raises CheckpointError unless the adapter of this name, which is on the model, is the file's but for values."""
    odd = sorted((present.keys() ^ file.layers.keys()) | copied)
    if odd:
        raise CheckpointError(
            f"{file.directory}: the model's LoRA layers of adapter {adapter!r} are not the file's (they differ at "
            f"{odd[0]}); give another name, or delete_adapter first"
        )
    for name, update in present.items():
        layer = file.layers[name]
        dora = layer.magnitude is not None
        if update.r != layer.r or update.scaling != layer.scaling or update.dora != dora:
            raise CheckpointError(
                f"{file.directory}: the LoRA layer {name} of adapter {adapter!r} has r={update.r}, "
                f"alpha={update.alpha}, rslora={update.rslora}, dora={update.dora}, the file r={layer.r}, "
                f"alpha={layer.alpha}, rslora={file.settings['use_rslora']}, dora={dora}"
            )
