"""Bottleneck adapters in files. PEFT has none, so the layout is nybble's own, in the same two files.

adapter_config.json: `peft_type` "BOTTLENECK", `target_modules` (names of the modules with a bottleneck behind them),
`size`, `size_pattern` ({name: size} where it is another), `placement`, `activation`, `dropout`, `scaling`,
`layer_norm`.
adapter_model.safetensors: base_model.model.NAME.bottleneck.{down,up}.{weight,bias} and .norm.{weight,bias}.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, PatternError
from ..nn.adapters import freeze_base
from ..nn.bottleneck import ACTIVATIONS, PLACEMENTS, Bottleneck, BottleneckAdapter, BottleneckConfig, put_bottlenecks
from ..nn.names import adapted_layers, base_modules
from ..nn.quantize import read_directly
from .adapter import BOTTLENECK_TYPE, CONFIG_NAME, FLOATS, PREFIX, WEIGHTS_NAME, read_settings
from .copies import load_copies, plan_copies
from .files import TensorInfo, read_header, read_tensor

_LEAVES = {
    "down.weight": "down_weight",
    "down.bias": "down_bias",
    "up.weight": "up_weight",
    "up.bias": "up_bias",
    "norm.weight": "norm_weight",
    "norm.bias": "norm_bias",
}
_INNER = ".bottleneck."
_SETTINGS = ("activation", "dropout", "scaling", "layer_norm")


def bottlenecks_of(model: nn.Module, adapter: str) -> dict[str, Bottleneck]:
    """The bottlenecks of an adapter by the names of the modules that they stand behind."""
    around = adapted_layers(model, (BottleneckAdapter,))
    return {name: module.adapters[adapter] for name, module in around.items() if adapter in module.adapters}


def save_bottleneck(model: nn.Module, adapter: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json's own part, tensors) of an adapter.

    Raises:
        ValueError: its bottlenecks differ in what the file has once: activation, dropout, scaling, layer_norm.
    """
    found = bottlenecks_of(model, adapter)
    for setting in _SETTINGS:
        if len({_setting(bottleneck, setting) for bottleneck in found.values()}) > 1:
            raise ValueError(f"model: the bottlenecks of adapter {adapter!r} differ in {setting}; a file has it once")
    one = next(iter(found.values()))
    size = Counter(bottleneck.size for bottleneck in found.values()).most_common(1)[0][0]
    config = {
        "peft_type": BOTTLENECK_TYPE,
        "target_modules": list(found),
        "size": size,
        "size_pattern": {name: bottleneck.size for name, bottleneck in found.items() if bottleneck.size != size},
        "placement": one.placement,
        **{setting: _setting(one, setting) for setting in _SETTINGS},
    }
    tensors = {}
    for name, bottleneck in found.items():
        for leaf, attribute in _LEAVES.items():
            value = getattr(bottleneck, attribute)
            if value is not None:
                tensors[f"{PREFIX}{name}{_INNER}{leaf}"] = value
    return config, tensors


def _setting(bottleneck: Bottleneck, setting: str) -> Any:
    return bottleneck.norm_weight is not None if setting == "layer_norm" else getattr(bottleneck, setting)


@torch.no_grad()
def load_bottleneck(model: nn.Module, directory: Path, adapter: str) -> None:
    """Put the bottlenecks of a directory on a model as the adapter of this name; see `nybble.load_adapter`.

    Raises:
        CheckpointNotFoundError: a file is missing.
        CheckpointError: a damaged file, a tensor that does not fit, or other bottlenecks of this name on the model.
        PatternError: the model has no module of a name.
    """
    settings = _checked(directory / CONFIG_NAME, read_settings(directory))
    tensors, others = _by_module(directory / WEIGHTS_NAME, settings["target_modules"])
    modules = {name: module for name, _, module in base_modules(model)}
    direct = read_directly(model)
    widths = {}
    for name, leaves in tensors.items():
        if name not in modules or name in direct:
            raise PatternError(
                f"{directory / WEIGHTS_NAME}: the model has no module {name!r} that this can stand behind"
            )
        widths[name] = _check_shapes(directory / WEIGHTS_NAME, name, leaves, settings)
        out = getattr(modules[name], "out_features", widths[name])
        if type(out) is int and out != widths[name]:
            raise CheckpointError(
                f"{directory / WEIGHTS_NAME}: {name}: the bottleneck is for an output of {widths[name]}, the model's "
                f"has {out}"
            )
    full = plan_copies(model, directory, settings.get("modules_to_save"), others)
    present = bottlenecks_of(model, adapter)
    if present:
        _check_present(directory, adapter, present, settings)
    else:
        freeze_base(model)
        base = BottleneckConfig(
            placement=settings["placement"], **{setting: settings[setting] for setting in _SETTINGS}
        )
        for name, width in widths.items():
            put_bottlenecks(model, adapter, {name: width}, replace(base, size=_size(settings, name)))
        present = bottlenecks_of(model, adapter)
    for name, leaves in tensors.items():
        for leaf, info in leaves.items():
            getattr(present[name], _LEAVES[leaf]).copy_(read_tensor(info))
    load_copies(model, adapter, full)


def _checked(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file, checked."""
    sizes = settings.setdefault("size_pattern", {})
    settings.setdefault("placement", PLACEMENTS[0])
    names = settings.get("target_modules")

    def need(good: bool, key: str, what: str) -> None:
        if not good:
            raise CheckpointError(f"{path}: {key} = {settings.get(key)!r}, {what} is needed")

    def positive(value: Any) -> bool:
        return type(value) is int and value > 0

    def number(key: str) -> bool:
        return type(settings.get(key)) in (int, float) and math.isfinite(settings[key])

    listed = isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
    need(listed, "target_modules", "a list of module names")
    need(positive(settings.get("size")), "size", "a positive integer")
    need(isinstance(sizes, dict) and all(map(positive, sizes.values())), "size_pattern", "names with positive integers")
    need(settings["placement"] in PLACEMENTS, "placement", " or ".join(map(repr, PLACEMENTS)))
    need(settings.get("activation") in tuple(ACTIVATIONS), "activation", " or ".join(map(repr, ACTIVATIONS)))
    need(number("dropout") and 0 <= settings["dropout"] < 1, "dropout", "a number in [0, 1)")
    need(number("scaling") and settings["scaling"] > 0, "scaling", "a positive number")
    need(type(settings.get("layer_norm")) is bool, "layer_norm", "true or false")
    return settings


def _by_module(file: Path, names: list[str]) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """({module: {leaf: tensor}} of the bottlenecks, other tensors by their names in the model)."""
    found: dict[str, dict[str, TensorInfo]] = {name: {} for name in names}
    others = {}
    for key, info in read_header(file)[0].items():
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{file}: tensor {key!r} is not of an adapter: names begin with {PREFIX!r}")
        if info.dtype not in FLOATS:
            raise CheckpointError(f"{file}: tensor {key!r} has dtype {info.dtype}, not F32, F16 or BF16")
        name, inner, leaf = key.removeprefix(PREFIX).rpartition(_INNER)
        if not inner:
            others[key.removeprefix(PREFIX)] = info
        elif name not in found or leaf not in _LEAVES:
            raise CheckpointError(f"{file}: tensor {key!r} belongs to no module of target_modules")
        else:
            found[name][leaf] = info
    return found, others


def _size(settings: dict[str, Any], name: str) -> int:
    return settings["size_pattern"].get(name, settings["size"])


def _check_shapes(file: Path, name: str, leaves: dict[str, TensorInfo], settings: dict[str, Any]) -> int:
    """The width of a module's output as its tensors have it; CheckpointError where they do not fit together."""
    wanted = [leaf for leaf in _LEAVES if settings["layer_norm"] or not leaf.startswith("norm")]
    missing = [leaf for leaf in wanted if leaf not in leaves]
    if missing:
        raise CheckpointError(f"{file}: tensor '{PREFIX}{name}{_INNER}{missing[0]}' is missing")
    extra = sorted(leaves.keys() - set(wanted))
    if extra:
        raise CheckpointError(f"{file}: {name} has a {extra[0]}, but layer_norm is false")
    size = _size(settings, name)
    shape = leaves["down.weight"].shape
    width = shape[1] if len(shape) == 2 else 0
    want: dict[str, tuple[int, ...]] = {
        "down.weight": (size, width),
        "down.bias": (size,),
        "up.weight": (width, size),
    }
    for leaf in wanted:
        info = leaves[leaf]
        if info.shape != want.get(leaf, (width,)) or width == 0:
            shown = "[size, width]" if width == 0 else list(want.get(leaf, (width,)))
            raise CheckpointError(
                f"{file}: tensor {info.name!r} has shape {list(info.shape)}; size {size} wants {shown}"
            )
    return width


def _check_present(directory: Path, adapter: str, present: dict[str, Bottleneck], settings: dict[str, Any]) -> None:
    """Raises CheckpointError unless the adapter of this name, which is on the model, is the file's but for values."""
    names = settings["target_modules"]
    odd = sorted(present.keys() ^ set(names))
    if odd:
        raise CheckpointError(
            f"{directory}: the model's bottlenecks of adapter {adapter!r} are not the file's (they differ at "
            f"{odd[0]}); give another name, or delete_adapter first"
        )
    for name, bottleneck in present.items():
        wants = {"size": _size(settings, name), **{setting: settings[setting] for setting in _SETTINGS}}
        for setting, want in wants.items():
            if setting != "dropout" and _setting(bottleneck, setting) != want:
                raise CheckpointError(
                    f"{directory}: the bottleneck behind {name} of adapter {adapter!r} has {setting} = "
                    f"{_setting(bottleneck, setting)!r}, the file {want!r}"
                )
