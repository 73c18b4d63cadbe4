"""Every tensor of a checkpoint to its place in a model that was built without memory for its parameters."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..tensor import QuantTensor
from .architecture import Names
from .bnb import Groups, prefix_of
from .fusion import Fusion, find_fusions, fused
from .shard_reader import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def place_quantized(model: PreTrainedModel, names: Names, groups: Groups, reader: Reader) -> None:
    """A `QuantLinear`, with its bias, for every linear layer whose weight is packed; parts of a fusion to its owner."""
    from ..nn import QuantLinear

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = {name for name, _ in model.named_modules()}
    bias_keys = set()
    plain = set(groups.plain)
    fusions = find_fusions(model, names, groups)
    for module, members in groups.quantized.items():
        where = reader.where(members["weight"])
        path = names.resolve_module(module, known)
        if path is None and any(module in fusion.sources for fusion in fusions.values()):
            continue
        if path is None or path not in linear:
            what = "no module" if path is None else f"a {type(model.get_submodule(path)).__name__}, not a Linear,"
            raise CheckpointError(
                f"{where} is quantized, but the model {type(model).__name__} has {what} at {module!r}"
            )
        skeleton = linear[path]
        state = {key: reader(name) for key, name in members.items()}
        quantized = QuantTensor.from_state(state, name=where, dtype=_int8_dtype(members, model))
        if quantized.shape != (skeleton.out_features, skeleton.in_features):
            want = [skeleton.out_features, skeleton.in_features]
            raise CheckpointError(f"{where} has shape {list(quantized.shape)}, the model wants {want}")
        bias = None
        if skeleton.bias is not None:
            key = f"{prefix_of(module)}bias"
            if key not in plain:
                raise CheckpointError(f"{where}: the model wants a bias, but there is no {key!r}")
            bias = _checked(reader, key, skeleton.bias)
            bias_keys.add(key)
        model.set_submodule(path, QuantLinear.from_quant_tensor(quantized, bias=bias))
    for fusion in fusions.values():
        fusion.place(model, groups, reader)
    groups.plain = [key for key in groups.plain if key not in bias_keys]


def place_others(model: PreTrainedModel, names: Names, groups: Groups, reader: Reader) -> None:
    """Packed parameters that are no linear layer's weight: the experts of a mixture."""
    from ..nn.experts import keep_packed

    known = dict(model.named_parameters())
    for name, members in groups.others.items():
        where = reader.where(members["weight"])
        path = names.resolve(name, known)
        if path is None:
            raise CheckpointError(f"{where} is quantized, but the model {type(model).__name__} has no such parameter")
        tensor = QuantTensor.from_state({key: reader(key_of) for key, key_of in members.items()}, name=where)
        if tuple(tensor.shape) != tuple(known[path].shape):
            raise CheckpointError(f"{where} has shape {list(tensor.shape)}, the model wants {list(known[path].shape)}")
        owner, _, leaf = path.rpartition(".")
        keep_packed(model.get_submodule(owner), leaf, tensor, known[path].dtype)


def place_plain(model: PreTrainedModel, names: Names, groups: Groups, reader: Reader) -> None:
    """Give every parameter and persistent buffer its tensor; errors list what is missing and what is left over."""
    places = _places(model)
    parameters = {full for shared in places for full, _, _ in shared}
    buffers = {name: b for name, b in model.named_buffers() if ".parametrizations." not in f".{name}"}
    known = parameters | buffers.keys()
    values: dict[str, Tensor] = {}
    unexpected = []
    fusions: dict[str, Fusion] = {}
    for key in groups.plain:
        path = names.resolve(key, known)
        fusion = names.fusion(key, parameters) if path is None else None
        if fusion is not None:
            target, converter, pattern = fusion
            want = model.get_parameter(target)
            fusions.setdefault(target, Fusion(target, tuple(want.shape), want.dtype, converter, model.config))
            fusions[target].sources[key] = pattern
        elif path is None:
            unexpected.append(key)
        elif path in parameters:
            values[path] = _checked(reader, key, model.get_parameter(path))
        elif _is_persistent(model, path):
            owner, _, leaf = path.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = _checked(reader, key, buffers[path])
    for found in fusions.values():
        values.update(fused(model, names, found, reader, parameters))
    missing = []
    for shared in places:
        if not _place_shared(model, shared, values):
            missing.append(shared[0][0])
    missing += [name for name, buffer in model.named_buffers() if buffer.device.type == "meta"]
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unexpected = [key for key in unexpected if not any(p.search(key) for p in ignored)]
    if missing or unexpected:
        lists = [
            (missing, "tensors of the model missing from the files"),
            (unexpected, "tensors the model does not have"),
        ]
        parts = [f"{len(n)} {what}: {', '.join(n[:4])}{' ...' if len(n) > 4 else ''}" for n, what in lists if n]
        if any(names.is_fused(key) for key in unexpected):
            parts.append("transformers fuses some of these while loading, which is not supported here")
        raise CheckpointError(f"{reader.source.root}: does not fit {type(model).__name__}: {'; '.join(parts)}")


def _int8_dtype(members: dict[str, str], model: PreTrainedModel) -> torch.dtype | None:
    """The int8 layout does not say what a weight was; the model does."""
    return model.dtype if "SCB" in members and model.dtype.is_floating_point else None


def _checked(reader: Reader, key: str, want: Tensor) -> Tensor:
    """A tensor of the file in the model's dtype; the file's own memory where the dtype is right already."""
    value = reader(key)
    if value.shape != want.shape:
        raise CheckpointError(f"{reader.where(key)} has shape {list(value.shape)}, the model wants {list(want.shape)}")
    return value.to(want.dtype) if want.dtype.is_floating_point else value


Place = tuple[str, nn.Module, str]  # full name, module, name in the module


def _places(model: nn.Module) -> list[list[Place]]:
    """Every parameter that is still to be loaded, as the list of all places that share it."""
    from ..nn import QuantLinear

    places: dict[int, list[Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear) or ".parametrizations." in f".{path}.":
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((f"{prefix_of(path)}{name}", module, name))
    return list(places.values())


def _place_shared(model: PreTrainedModel, shared: list[Place], values: dict[str, Tensor]) -> bool:
    """Load one parameter wherever it is tied to; False if the files have none of its names.

    Places stay tied unless the files hold different values under two of the names, which then each get their own.
    """
    given = [full for full, _, _ in shared if full in values]
    if not given:
        return False
    main = nn.Parameter(values[given[0]], requires_grad=values[given[0]].is_floating_point())
    for full, module, name in shared:
        own = values.get(full)
        if own is None or own is values[given[0]] or torch.equal(own, main):
            module._parameters[name] = main
        else:
            module._parameters[name] = nn.Parameter(own, requires_grad=own.is_floating_point())
            if hasattr(model.config, "tie_word_embeddings"):
                model.config.tie_word_embeddings = False
    return True


def _is_persistent(model: nn.Module, path: str) -> bool:
    owner, _, leaf = path.rpartition(".")
    return leaf not in model.get_submodule(owner)._non_persistent_buffers_set
