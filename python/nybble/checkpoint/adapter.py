"""Adapters on disk, in the layout of PEFT 0.21: what the two files say, checked, without a model.

LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353), LoRA of embeddings, and full copies of
modules (`modules_to_save`).
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, CheckpointNotFoundError, NonFiniteError
from .files import DTYPE_NAMES, TensorInfo, read_header, read_json, read_tensor
from .writer import ShardWriter, Slot, Staging, tensor_bytes

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
FLOATS = ("F32", "F16", "BF16")

_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "rank_pattern",
    "alpha_pattern", "modules_to_save",
}  # fmt: skip
# Keys that say nothing about what is computed here: the tensors themselves tell which layers have an adapter.
_WITHOUT_EFFECT = {
    "task_type", "base_model_name_or_path", "inference_mode", "exclude_modules", "init_lora_weights", "peft_version",
    "layers_to_transform", "layers_pattern", "auto_mapping", "revision", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
# Keys that change what is computed, with the values that leave it alone.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
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
_PARTS = {
    "lora_A.weight": ("linear", "lora_A"),
    "lora_B.weight": ("linear", "lora_B"),
    "lora_embedding_A": ("embedding", "lora_A"),
    "lora_embedding_B": ("embedding", "lora_B"),
    "lora_magnitude_vector": ("", "magnitude"),
}


@dataclass(frozen=True)
class AdapterLayer:
    """One layer's update, W + scaling * B A: a linear layer's, or an embedding's, (scaling * B A)^T.

    Attributes:
        path: of the layer in the model. r, alpha, scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        lora_A: [r, in] (embedding: [r, vocabulary]). lora_B: [out, r] (embedding: [dimension, r]).
        magnitude: DoRA's norms: of a linear layer's rows, [out]; of an embedding's columns, [dimension].
    """

    path: str
    r: int
    alpha: float
    scaling: float
    lora_A: TensorInfo
    lora_B: TensorInfo
    magnitude: TensorInfo | None
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it is for."""
        a, b = self.lora_A.shape[1], self.lora_B.shape[0]
        return (b, a) if self.kind == "linear" else (a, b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) in fp32, as stored; NonFiniteError if one holds NaN or infinity."""
        return read_finite(self.lora_A), read_finite(self.lora_B)


def read_finite(info: TensorInfo) -> Tensor:
    """A tensor in fp32.

    Raises:
        NonFiniteError: it holds NaN or infinity; names the tensor and its file.
    """
    values = read_tensor(info).float()
    finite = torch.isfinite(values).reshape(-1)
    if not bool(finite.all()):
        index, count = int((~finite).to(torch.uint8).argmax()), int((~finite).sum())
        detail = f"the value at flat index {index}, row-major in {list(info.shape)}, is not finite"
        raise NonFiniteError(f"{info.name} ({info.path})", index, count, detail)
    return values


@dataclass
class AdapterFile:
    """An adapter directory.

    Attributes:
        settings: of adapter_config.json, defaults filled in.
        layers: by path. saved: full tensors by their name in the model's state dict.
    """

    directory: Path
    settings: dict[str, Any]
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    saved: dict[str, TensorInfo] = field(default_factory=dict)


def read_adapter(directory: str | Path) -> AdapterFile:
    """Read a LoRA adapter's settings and the shapes of its tensors, without their values.

    Raises:
        CheckpointNotFoundError: one of the two files is missing.
        CheckpointError: a damaged file, a setting that is not allowed, a tensor that does not fit: names them.
    """
    directory = Path(directory)
    settings = read_settings(directory)
    if settings["peft_type"] != "LORA":
        kind = settings["peft_type"]
        raise CheckpointError(
            f"{directory / CONFIG_NAME}: peft_type is {kind!r}, 'LORA' is needed: {_NO_WEIGHTS[kind]}"
        )
    result = AdapterFile(directory, settings)
    path = directory / WEIGHTS_NAME
    parts: dict[str, dict[str, TensorInfo]] = {}
    kinds: dict[str, str] = {}
    for name, info in read_header(path)[0].items():
        if not name.startswith(PREFIX):
            raise CheckpointError(f"{path}: tensor {name!r} is not of an adapter: names begin with {PREFIX!r}")
        inner = name.removeprefix(PREFIX)
        suffix = next((suffix for suffix in _PARTS if inner.endswith(f".{suffix}")), None)
        if suffix is None:
            result.saved[inner.replace(".base_layer.", ".")] = info
            continue
        kind, part = _PARTS[suffix]
        module = inner.removesuffix(f".{suffix}")
        parts.setdefault(module, {})[part] = info
        if kind:
            kinds[module] = kind
    for module, found in parts.items():
        result.layers[module] = _layer(path, module, found, kinds.get(module, "linear"), settings)
    if not result.layers and not result.saved:
        raise CheckpointError(f"{path}: holds no LoRA tensor")
    return result


def _layer(file: Path, module: str, parts: dict[str, TensorInfo], kind: str, settings: dict[str, Any]) -> AdapterLayer:
    missing = [part for part in ("lora_A", "lora_B") if part not in parts]
    if missing:
        raise CheckpointError(f"{file}: {module}: {missing[0]} is missing; both lora_A and lora_B are needed")
    a, b, magnitude = parts["lora_A"], parts["lora_B"], parts.get("magnitude")
    if settings["use_dora"] and magnitude is None:
        raise CheckpointError(f"{file}: {module}: use_dora is set, but there is no lora_magnitude_vector")
    r = pattern_value(settings, "rank_pattern", module, "r")
    alpha = pattern_value(settings, "alpha_pattern", module, "lora_alpha")
    for info in (a, b, *(() if magnitude is None else (magnitude,))):
        if info.dtype not in FLOATS:
            raise CheckpointError(f"{file}: tensor {info.name!r} has dtype {info.dtype}, not F32, F16 or BF16")
    if len(a.shape) != 2 or a.shape[0] != r:
        raise CheckpointError(f"{file}: tensor {a.name!r} has shape {list(a.shape)}; rank {r} wants [{r}, inputs]")
    if len(b.shape) != 2 or b.shape[1] != r:
        raise CheckpointError(f"{file}: tensor {b.name!r} has shape {list(b.shape)}; rank {r} wants [outputs, {r}]")
    # PEFT: norms of the rows of a linear layer's [out, in], of the columns of an embedding's [vocabulary, dim].
    if magnitude is not None and magnitude.numel != b.shape[0]:
        raise CheckpointError(
            f"{file}: tensor {magnitude.name!r} has shape {list(magnitude.shape)}, not [{b.shape[0]}]"
        )
    scaling = alpha / (math.sqrt(r) if settings["use_rslora"] else r)
    return AdapterLayer(module, r, alpha, scaling, a, b, magnitude if settings["use_dora"] else None, kind)


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's two files, replacing an adapter that is there; all of it or nothing.

    Raises:
        StorageFullError: the disk is full; what was there is untouched.
    """
    slots = [Slot(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with Staging(directory) as staging:
        writer = ShardWriter(staging, WEIGHTS_NAME, slots, {"format": "pt"})
        for slot in slots:
            writer.write(slot.name, slot.dtype, slot.shape or (), [tensor_bytes(tensors[slot.name])])
        writer.finish()
        staging.write(CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())
        staging.commit()


# What model classes call the model inside them, where a directory does not say which class it is of.
_INNER = ("model", "transformer", "backbone")


def match_names(wanted: Sequence[str], known: Collection[str], root: Path) -> dict[str, str]:
    """Which of a checkpoint's tensors each of `wanted` is; names without a counterpart are absent.

    A name is its own counterpart, or the one that differs as transformers renames while loading, or by the base model's
    prefix. Where the directory does not say what model it holds, that prefix is a usual one, the same for all names.

    Args:
        wanted: names of a model's state dict. known: names of the tensors in the directory `root`.

    Raises:
        CheckpointError: two tensors could be one of the names.
    """
    found = {name: name for name in wanted if name in known}
    rest = {name for name in wanted if name not in found}
    if not rest:
        return found
    names = _transformers_names(root)
    if names is not None:
        for key in known:
            name = names.resolve(key, rest)
            if name in found:
                raise CheckpointError(f"{root}: {found[name]!r} and {key!r} could both be {name!r}")
            if name is not None:
                found[name] = key
        return found
    ways: list[dict[str, str]] = [{name: f"{prefix}.{name}" for name in rest} for prefix in _INNER]
    ways += [{name: name.removeprefix(f"{prefix}.") for name in rest} for prefix in _INNER]
    fitting = [way for way in ways if all(other in known for other in way.values())]
    return {**found, **fitting[0]} if len(fitting) == 1 else found


def _transformers_names(root: Path) -> Any:
    """`load.Names` of the directory's model class, None where it cannot be built."""
    if not (root / "config.json").is_file():
        return None
    from .load import describe

    try:
        return describe(root).names
    # As in `select`: no transformers, an unknown architecture, or a config that its class rejects.
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None


def pattern_value(settings: dict[str, Any], patterns: str, path: str, default: str) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of the path, from a dot on."""
    for pattern, value in settings[patterns].items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return settings[default]


def read_settings(directory: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter; of LoRA checked, defaults filled in, of the other kinds as it is.

    Raises:
        CheckpointNotFoundError, CheckpointError: see `read_adapter`.
    """
    path = directory / CONFIG_NAME
    for needed in (path, directory / WEIGHTS_NAME):
        if not needed.is_file():
            old = " (adapter_model.bin is not read, only safetensors)"
            other = old if (directory / "adapter_model.bin").is_file() else ""
            raise CheckpointNotFoundError(f"{needed}: no such file{other}")
    raw = read_json(path)
    others = (*PROMPT_TYPES, BOTTLENECK_TYPE)
    if raw.get("peft_type") in others:
        return raw
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {raw.get('peft_type')!r}; 'LORA', {', '.join(map(repr, others))} can be loaded"
        )
    for key, neutral in _UNSUPPORTED.items():
        if key in raw and raw[key] not in neutral:
            raise CheckpointError(f"{path}: {key} = {raw[key]!r} is not supported")
    unknown = sorted(raw.keys() - _READ - _WITHOUT_EFFECT - _UNSUPPORTED.keys())
    if unknown:
        warnings.warn(f"{path}: unknown keys are ignored: {', '.join(unknown)}", UserWarning, stacklevel=4)
    settings: dict[str, Any] = {
        "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "target_modules": None,
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
    }  # fmt: skip
    settings.update({key: raw[key] for key in _READ & raw.keys()})
    for key in ("rank_pattern", "alpha_pattern"):
        settings[key] = settings[key] or {}
    settings["lora_dropout"] = settings["lora_dropout"] or 0.0
    _check_values(path, settings)
    return settings


#: Adapters that are virtual tokens or virtual keys and values.
PROMPT_TYPES = ("PREFIX_TUNING", "PROMPT_TUNING")
#: Bottleneck adapters, which PEFT does not have: nybble's own type in the same two files.
BOTTLENECK_TYPE = "BOTTLENECK"
#: Why their adapters cannot become part of the weights, nor be combined with others.
_NO_WEIGHTS = {
    "PREFIX_TUNING": "a prefix is keys and values beside those of the text, and no change of a weight",
    "PROMPT_TUNING": "a prompt is embeddings before those of the text, and no change of a weight",
    BOTTLENECK_TYPE: "a bottleneck is a network with a non-linear activation, which no weight can stand for",
}


def _check_values(path: Path, settings: dict[str, Any]) -> None:
    def need(good: bool, key: str, what: str) -> None:
        if not good:
            raise CheckpointError(f"{path}: {key} = {settings[key]!r}, {what} is needed")

    def number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and value > 0

    need(type(settings["r"]) is int and settings["r"] > 0, "r", "a positive integer")
    need(number(settings["lora_alpha"]), "lora_alpha", "a positive number")
    dropout = settings["lora_dropout"]
    need(type(dropout) in (int, float) and 0 <= dropout < 1, "lora_dropout", "a number in [0, 1)")
    for key in ("use_rslora", "use_dora"):
        need(settings[key] in (True, False, None), key, "true or false")
        settings[key] = bool(settings[key])
    for key, good in (("rank_pattern", lambda v: type(v) is int and v > 0), ("alpha_pattern", number)):
        patterns = settings[key]
        need(
            isinstance(patterns, dict) and all(map(good, patterns.values())), key, "name patterns with positive numbers"
        )
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"{path}: {key} has {pattern!r}, which is no regular expression") from error
    for key in ("target_modules", "modules_to_save"):
        value = settings[key]
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        need(value is None or isinstance(value, str) or names, key, "a list of names")
