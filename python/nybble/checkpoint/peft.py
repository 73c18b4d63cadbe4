"""Adapters on disk, in the layout of PEFT 0.21: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, CheckpointNotFoundError, PatternError
from ..nn import LoRAConfig, LoRALinear, QuantLinear, add_lora
from .files import DTYPE_NAMES, TensorInfo, read_header, read_json, read_tensor
from .writer import ShardWriter, Slot, Staging, tensor_bytes

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
}
# Keys that say nothing about what is computed here: the tensors themselves tell which layers have an adapter.
_WITHOUT_EFFECT = {
    "task_type", "base_model_name_or_path", "inference_mode", "exclude_modules", "init_lora_weights", "peft_version",
    "layers_to_transform", "layers_pattern", "auto_mapping", "revision", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
# Keys that change what is computed, with the values that leave it alone.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's `LoRALinear` modules by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> None:
    """Write the model's LoRA weights as PEFT does, replacing an adapter that is there.

    Args:
        model: with `LoRALinear` layers, as `add_lora` makes them.
        directory: made if it does not exist.
        base: what `base_model_name_or_path` says; by default where the model was loaded from, if it knows.

    Raises:
        ValueError: the model has no LoRA layer, or mixes rsLoRA with plain scaling, which the layout cannot say.
        StorageFullError: the disk is full; the adapter that was there is untouched.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no LoRALinear layer to save; see nybble.add_lora")
    config = _adapter_config(model, layers, base)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = layer.lora_A
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = layer.lora_B
    slots = [Slot(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with Staging(Path(directory)) as staging:
        writer = ShardWriter(staging, WEIGHTS_NAME, slots, {"format": "pt"})
        for slot in slots:
            writer.write(slot.name, slot.dtype, slot.shape or (), [tensor_bytes(tensors[slot.name])])
        writer.finish()
        staging.write(CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())
        staging.commit()


def _adapter_config(model: nn.Module, layers: dict[str, LoRALinear], base: Any) -> dict[str, Any]:
    if len({layer.rslora for layer in layers.values()}) > 1:
        raise ValueError("model: some LoRA layers use rsLoRA and some do not; an adapter file has one setting for all")
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    if base is None:
        base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    task = next((task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending)), None)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": None if base is None else str(base),
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "target_modules": _target_modules(model, layers),
        "exclude_modules": None,
        "bias": "none",
        "use_rslora": next(iter(layers.values())).rslora,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {path: layer.r for path, layer in layers.items() if layer.r != r},
        "alpha_pattern": {path: layer.alpha for path, layer in layers.items() if layer.alpha != alpha},
        "fan_in_fan_out": False,
    }


def _target_modules(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str]:
    """Last parts of the names where they mean exactly these layers, whole paths where they do not."""
    others = {name for name, module in _linears(model) if name not in layers}
    taken = {name.rpartition(".")[2] for name in others}
    return sorted({path if (leaf := path.rpartition(".")[2]) in taken else leaf for path in layers})


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside = tuple(f"{path}." for path in lora_layers(model))
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, QuantLinear, LoRALinear)) and not (inside and name.startswith(inside)):
            yield name, module


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Put a LoRA adapter in PEFT's layout on a model, by `add_lora` if it has no adapter yet.

    Args:
        model: its linear layers have the paths that the adapter names; changed in place.
        directory: with adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointNotFoundError: one of the two files is missing.
        CheckpointError: a damaged file, a tensor that does not fit its layer, or a feature that is not LoRA's.
        PatternError: `target_modules` names a module that the model does not have.
    """
    directory = Path(directory)
    settings = _read_settings(directory)
    infos, others = _adapter_tensors(directory / WEIGHTS_NAME)
    linears = dict(_linears(model))
    _check_targets(directory, settings, infos, linears)
    ranks = {path: _checked_rank(path, pair, settings, linears[path]) for path, pair in infos.items()}
    _check_base_weights(model, others)
    layers = lora_layers(model)
    if not layers:
        _add_layers(model, settings, ranks)
        layers = lora_layers(model)
    if layers.keys() != ranks.keys():
        odd = sorted(layers.keys() ^ ranks.keys())
        raise CheckpointError(f"{directory}: the model's LoRA layers are not the adapter's (they differ at {odd[0]})")
    for path, layer in layers.items():
        if layer.r != ranks[path] or layer.scaling != _scaling(path, ranks[path], settings):
            raise CheckpointError(
                f"{directory}: the LoRA layer {path} has r={layer.r}, alpha={layer.alpha}, rslora={layer.rslora}, "
                f"the adapter r={ranks[path]}, alpha={_pattern(settings, 'alpha_pattern', path, 'lora_alpha')}, "
                f"rslora={settings['use_rslora']}"
            )
    with torch.no_grad():
        for path, layer in layers.items():
            layer.lora_A.copy_(read_tensor(infos[path]["lora_A"]))
            layer.lora_B.copy_(read_tensor(infos[path]["lora_B"]))


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    for needed in (path, directory / WEIGHTS_NAME):
        if not needed.is_file():
            other = (
                " (adapter_model.bin is not read, only safetensors)"
                if (directory / "adapter_model.bin").is_file()
                else ""
            )
            raise CheckpointNotFoundError(f"{needed}: no such file{other}")
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {raw.get('peft_type')!r}, only 'LORA' can be loaded")
    for key, neutral in _UNSUPPORTED.items():
        if key in raw and raw[key] not in neutral:
            raise CheckpointError(f"{path}: {key} = {raw[key]!r} is not supported")
    unknown = sorted(raw.keys() - _READ - _WITHOUT_EFFECT - _UNSUPPORTED.keys())
    if unknown:
        warnings.warn(f"{path}: unknown keys are ignored: {', '.join(unknown)}", UserWarning, stacklevel=3)
    settings: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": None,
    }
    settings.update({key: raw[key] for key in _READ & raw.keys()})
    for key in ("rank_pattern", "alpha_pattern"):
        settings[key] = settings.get(key) or {}
    r = settings["r"]
    if type(r) is not int or r <= 0:
        raise CheckpointError(f"{path}: r = {r!r}, a positive integer is needed")
    return settings


def _adapter_tensors(path: Path) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """{module path: {"lora_A": ..., "lora_B": ...}} of the file, and its other weights by module path."""
    pairs: dict[str, dict[str, TensorInfo]] = {}
    others: dict[str, TensorInfo] = {}
    for name, info in read_header(path)[0].items():
        if not name.startswith(_PREFIX) or not name.endswith(".weight"):
            raise CheckpointError(f"{path}: tensor {name!r} is not a weight of an adapter for linear layers")
        module = name.removeprefix(_PREFIX).removesuffix(".weight")
        owner, _, part = module.rpartition(".")
        if part in {"lora_A", "lora_B"}:
            pairs.setdefault(owner, {})[part] = info
        else:
            others[module.removesuffix(".base_layer")] = info
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise CheckpointError(
                f"{path}: {module}: only {', '.join(pair)} is there, both lora_A and lora_B are needed"
            )
    if not pairs:
        raise CheckpointError(f"{path}: holds no LoRA tensor")
    return pairs, others


def _check_base_weights(model: nn.Module, others: dict[str, TensorInfo]) -> None:
    """PEFT adds copies of the base's embeddings when an adapter is on one; they must be what the model has."""
    modules = dict(model.named_modules())
    for path, info in others.items():
        module = modules.get(path)
        module = module.base if isinstance(module, LoRALinear) else module
        weight = getattr(module, "weight", None)
        if isinstance(module, QuantLinear) or not isinstance(weight, Tensor):
            raise CheckpointError(f"{info.path}: tensor {info.name!r} is no adapter and cannot be loaded")
        if info.shape != tuple(weight.shape) or not torch.equal(read_tensor(info).to(weight), weight):
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} is not the model's; changed base weights cannot be loaded"
            )


def _check_targets(directory: Path, settings: dict[str, Any], infos: dict[str, Any], linears: dict[str, Any]) -> None:
    targets = settings["target_modules"]
    for target in targets if isinstance(targets, list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            raise PatternError(f"{directory / CONFIG_NAME}: target_modules: {target!r} is no linear layer of the model")
    for path in infos:
        if path not in linears:
            raise PatternError(f"{directory / WEIGHTS_NAME}: the model has no linear layer {path!r}")


def _pattern(settings: dict[str, Any], patterns: str, path: str, default: str) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of the path, from a dot on."""
    for pattern, value in settings[patterns].items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return settings[default]


def _scaling(path: str, r: int, settings: dict[str, Any]) -> float:
    alpha = _pattern(settings, "alpha_pattern", path, "lora_alpha")
    return alpha / (r**0.5 if settings["use_rslora"] else r)


def _checked_rank(path: str, pair: dict[str, TensorInfo], settings: dict[str, Any], module: nn.Module) -> int:
    base = module.base if isinstance(module, LoRALinear) else module
    r = _pattern(settings, "rank_pattern", path, "r")
    for part, want in (("lora_A", (r, base.in_features)), ("lora_B", (base.out_features, r))):
        info = pair[part]
        if info.shape != want:
            raise CheckpointError(f"{info.path}: tensor {info.name!r} has shape {list(info.shape)}, not {list(want)}")
        if info.dtype not in {"F32", "F16", "BF16"}:
            raise CheckpointError(f"{info.path}: tensor {info.name!r} has dtype {info.dtype}, not F32, F16 or BF16")
    return int(r)


def _add_layers(model: nn.Module, settings: dict[str, Any], ranks: dict[str, int]) -> None:
    config = LoRAConfig(
        r=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings["lora_dropout"],
        target=tuple(ranks),
        exclude=(),
        rslora=settings["use_rslora"],
    )
    add_lora(model, config)
    for path, layer in lora_layers(model).items():
        alpha = _pattern(settings, "alpha_pattern", path, "lora_alpha")
        if layer.r != ranks[path] or layer.alpha != alpha:
            other = LoRALinear.from_base(
                layer.base, r=ranks[path], alpha=alpha, dropout=settings["lora_dropout"], rslora=settings["use_rslora"]
            )
            model.set_submodule(path, other)
