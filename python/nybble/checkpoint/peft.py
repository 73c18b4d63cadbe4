"""LoRA adapters between a model and PEFT's files: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, PatternError
from ..nn import LoRAConfig, LoRAEmbedding, LoRALinear, QuantLinear, add_lora
from ..nn.inject import set_module, train_in_full
from .adapter import (
    CONFIG_NAME,
    PREFIX,
    PROMPT_TYPES,
    WEIGHTS_NAME,
    AdapterFile,
    AdapterLayer,
    read_adapter,
    read_settings,
)
from .files import DTYPE_NAMES, TensorInfo, read_tensor
from .writer import ShardWriter, Slot, Staging, tensor_bytes

Layer = LoRALinear | LoRAEmbedding

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's `LoRALinear` modules by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapted_layers(model: nn.Module) -> dict[str, Layer]:
    """The model's layers with a low-rank update, linear ones and embeddings, by path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LoRALinear, LoRAEmbedding))}


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> None:
    """Write what is trained of a model as PEFT does, replacing an adapter that is there.

    That is the low-rank updates, and as `modules_to_save` every other module with trainable parameters; or a prefix or
    prompt (`nybble.nn.prefix`, `nybble.nn.prompt`).

    Args:
        model: with `LoRALinear` layers, as `add_lora` makes them, or a prefix or prompt.
        directory: made if it does not exist.
        base: what `base_model_name_or_path` says; by default where the model was loaded from, if it knows.

    Raises:
        ValueError: the model has nothing to save, or mixes rsLoRA or DoRA with plain layers, which the layout cannot
            say.
        StorageFullError: the disk is full; the adapter that was there is untouched.
    """
    from .virtual import attached, save_virtual

    if base is None:
        base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    common = {
        "task_type": next((task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending)), None),
        "base_model_name_or_path": None if base is None else str(base),
        "inference_mode": True,
    }
    if attached(model) is not None:
        config, tensors = save_virtual(model)
    else:
        config, tensors = _lora_to_save(model)
    slots = [Slot(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with Staging(Path(directory)) as staging:
        writer = ShardWriter(staging, WEIGHTS_NAME, slots, {"format": "pt"})
        for slot in slots:
            writer.write(slot.name, slot.dtype, slot.shape or (), [tensor_bytes(tensors[slot.name])])
        writer.finish()
        staging.write(CONFIG_NAME, (json.dumps({**config, **common}, indent=2) + "\n").encode())
        staging.commit()


def _lora_to_save(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no LoRALinear layer to save; see nybble.add_lora")
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        if isinstance(layer, LoRAEmbedding):
            tensors[f"{PREFIX}{path}.lora_embedding_A"] = layer.lora_A
            tensors[f"{PREFIX}{path}.lora_embedding_B"] = layer.lora_B
            continue
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B
        if layer.lora_magnitude is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = layer.lora_magnitude
    full = _trained_in_full(model, layers)
    for path in full:
        for name, value in model.get_submodule(path).state_dict().items():
            tensors[f"{PREFIX}{path}.{name}"] = value
    return _lora_config(model, layers, full), tensors


def _trained_in_full(model: nn.Module, layers: dict[str, Layer]) -> list[str]:
    """Modules with trainable parameters of their own that are no low-rank update."""
    inside = tuple(f"{path}." for path in layers)
    found = []
    for path, module in model.named_modules():
        own = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if own and path not in layers and not (inside and path.startswith(inside)):
            if not path:
                raise ValueError("model: it has trainable parameters of its own, which an adapter file cannot hold")
            found.append(path)
    return found


def _same(layers: dict[str, Layer], name: str) -> bool:
    """What all linear layers have for a setting that the file has once."""
    values = {getattr(layer, name) for layer in layers.values() if name != "dora" or isinstance(layer, LoRALinear)}
    if len(values) > 1:
        shown = {"rslora": "rsLoRA", "dora": "DoRA"}[name]
        raise ValueError(
            f"model: some LoRA layers use {shown} and some do not; an adapter file has one setting for all"
        )
    return bool(values and values.pop())


def _lora_config(model: nn.Module, layers: dict[str, Layer], full: list[str]) -> dict[str, Any]:
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "target_modules": _target_modules(model, layers),
        "exclude_modules": None,
        "bias": "none",
        "use_rslora": _same(layers, "rslora"),
        "use_dora": _same(layers, "dora"),
        "modules_to_save": full or None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {path: layer.r for path, layer in layers.items() if layer.r != r},
        "alpha_pattern": {path: layer.alpha for path, layer in layers.items() if layer.alpha != alpha},
        "fan_in_fan_out": False,
    }


def _target_modules(model: nn.Module, layers: dict[str, Layer]) -> list[str]:
    """Last parts of the names where they mean exactly these layers, whole paths where they do not."""
    others = {name for name, module in _adaptable(model) if name not in layers}
    taken = {name.rpartition(".")[2] for name in others}
    return sorted({path if (leaf := path.rpartition(".")[2]) in taken else leaf for path in layers})


def _adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that an adapter can be for, with one or without."""
    inside = tuple(f"{path}." for path in adapted_layers(model))
    for name, module in model.named_modules():
        kinds = (nn.Linear, QuantLinear, nn.Embedding, LoRALinear, LoRAEmbedding)
        if isinstance(module, kinds) and not (inside and name.startswith(inside)):
            yield name, module


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Put an adapter in PEFT's layout on a model.

    LoRA with rsLoRA, DoRA, patterns, embeddings and modules_to_save; prefix and prompt tuning. LoRA layers that are
    there already take the values if they are the adapter's.

    Args:
        model: its layers have the paths that the adapter names; changed in place, and unchanged after an error.
        directory: with adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointNotFoundError: one of the two files is missing.
        CheckpointError: a damaged file, a tensor that does not fit its layer, or a kind of adapter that is not known.
        PatternError: the adapter names a layer that the model does not have.
    """
    directory = Path(directory)
    if read_settings(directory)["peft_type"] in PROMPT_TYPES:
        from .virtual import load_virtual

        load_virtual(model, directory)
        return
    file = read_adapter(directory)
    modules = dict(_adaptable(model))
    _check_targets(file, modules)
    for layer in file.layers.values():
        _check_shape(layer, modules[layer.path])
    full = _modules_to_save(model, file)
    present = adapted_layers(model)
    if present:
        _check_present(file, present)
    else:
        _add_layers(model, file)
        present = adapted_layers(model)
    with torch.no_grad():
        for path, module in present.items():
            layer = file.layers[path]
            module.lora_A.copy_(read_tensor(layer.lora_A))
            module.lora_B.copy_(read_tensor(layer.lora_B))
            if layer.magnitude is not None and isinstance(module, LoRALinear) and module.lora_magnitude is not None:
                module.lora_magnitude.copy_(read_tensor(layer.magnitude).reshape(-1))
        for path, tensors in full.items():
            _save_in_full(model, path, tensors)


def _check_targets(file: AdapterFile, modules: dict[str, nn.Module]) -> None:
    targets = file.settings["target_modules"]
    for target in targets if isinstance(targets, list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise PatternError(
                f"{file.directory / CONFIG_NAME}: target_modules: {target!r} is no linear layer of the model"
            )
    for path, layer in file.layers.items():
        module = modules.get(path)
        wanted = (nn.Embedding, LoRAEmbedding) if layer.kind == "embedding" else (nn.Linear, QuantLinear, LoRALinear)
        if not isinstance(module, wanted):
            kind = "embedding" if layer.kind == "embedding" else "linear layer"
            raise PatternError(f"{file.directory / WEIGHTS_NAME}: the model has no {kind} {path!r}")


def _check_shape(layer: AdapterLayer, module: nn.Module) -> None:
    base: Any = module.base if isinstance(module, (LoRALinear, LoRAEmbedding)) else module
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


def _check_present(file: AdapterFile, present: dict[str, Layer]) -> None:
    directory = file.directory
    if present.keys() != file.layers.keys():
        odd = sorted(present.keys() ^ file.layers.keys())
        raise CheckpointError(f"{directory}: the model's LoRA layers are not the adapter's (they differ at {odd[0]})")
    for path, module in present.items():
        layer = file.layers[path]
        dora = layer.magnitude is not None
        if module.r != layer.r or module.scaling != layer.scaling or module.dora != dora:
            raise CheckpointError(
                f"{directory}: the LoRA layer {path} has r={module.r}, alpha={module.alpha}, rslora={module.rslora}, "
                f"dora={module.dora}, the adapter r={layer.r}, alpha={layer.alpha}, "
                f"rslora={file.settings['use_rslora']}, dora={dora}"
            )


def _add_layers(model: nn.Module, file: AdapterFile) -> None:
    settings = file.settings
    linear = {path: layer for path, layer in file.layers.items() if layer.kind == "linear"}
    if linear:
        config = LoRAConfig(
            r=settings["r"],
            alpha=settings["lora_alpha"],
            dropout=settings["lora_dropout"],
            target=tuple(linear),
            exclude=(),
            rslora=settings["use_rslora"],
            dora=settings["use_dora"],
            rank_pattern={path: layer.r for path, layer in linear.items()},
            alpha_pattern={path: layer.alpha for path, layer in linear.items()},
        )
        add_lora(model, config)
    else:
        model.requires_grad_(False)
    for path, layer in file.layers.items():
        if layer.kind == "embedding":
            base: Any = model.get_submodule(path)
            set_module(model, path, LoRAEmbedding(base, layer.r, layer.alpha, settings["use_rslora"]))


def _modules_to_save(model: nn.Module, file: AdapterFile) -> dict[str, dict[str, TensorInfo]]:
    """{module path: {name inside: tensor}} of full copies; those that only repeat the model's own weights are left out.

    PEFT adds copies of the embeddings when an adapter is on one, without naming them in `modules_to_save`.
    """
    named = file.settings["modules_to_save"] or []
    named = [named] if isinstance(named, str) else named
    modules = dict(model.named_modules())
    result: dict[str, dict[str, TensorInfo]] = {}
    for wanted in named:
        if not any(f".{wanted}." in f".{name}" for name in file.saved):
            raise CheckpointError(f"{file.directory / WEIGHTS_NAME}: no tensor of {wanted!r}, named in modules_to_save")
    for name, info in file.saved.items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        module = module.base if isinstance(module, (LoRALinear, LoRAEmbedding)) else module
        own = getattr(module, leaf, None)
        in_full = any(f".{wanted}." in f".{path}." for wanted in named)
        if isinstance(module, QuantLinear) and in_full:
            shape: tuple[int, ...] = (
                (module.out_features, module.in_features) if leaf == "weight" else (module.out_features,)
            )
        elif isinstance(own, Tensor) and not isinstance(module, QuantLinear):
            shape = tuple(own.shape)
        else:
            raise CheckpointError(f"{info.path}: tensor {info.name!r} is no adapter and cannot be loaded")
        if info.shape != shape:
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} has shape {list(info.shape)}, the model's has {list(shape)}"
            )
        if in_full:
            result.setdefault(path, {})[leaf] = info
        elif not torch.equal(read_tensor(info).to(own), own):  # type: ignore[arg-type]
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} is not the model's, and modules_to_save does not name it"
            )
    return result


def _save_in_full(model: nn.Module, path: str, tensors: dict[str, TensorInfo]) -> None:
    """Give a module the full weights of an adapter, as parameters of its own that train."""
    module: Any = model.get_submodule(path)
    if isinstance(module, QuantLinear):
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=module.dtype)
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.detach().clone())
        set_module(model, path, plain.train(module.training))
        module = plain
    train_in_full(module)
    for leaf, info in tensors.items():
        getattr(module, leaf).copy_(read_tensor(info))
