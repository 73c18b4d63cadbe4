"""Loading a checkpoint into a module of the user's own: names map one to one, tensors stay in the mapped file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn import QuantLinear
from ..nn.adapters import Adapted
from ..nn.experts import keep_packed, packed_parameters
from ..nn.names import base_modules, set_module
from ..tensor import QuantTensor
from .bnb import group, prefix_of
from .files import Source, open_source
from .load import Reader

_SHOWN = 4


def load_into(module: nn.Module, directory: str | os.PathLike[str], *, strict: bool = True) -> list[str]:
    """Point a module's parameters and buffers at the tensors of a checkpoint, by name.

    Nothing is read or copied where the file has the module's dtype: the tensors lie in the mapped file, a page is read
    when it is first used, and processes that load the same file share its pages. What is written into such a tensor
    later stays in this process and does not reach the file. Where dtypes differ the tensor is cast to the module's.

    A linear layer whose weight is quantized in the file becomes a `QuantLinear`; a `QuantLinear`, also inside a
    `LoRALinear`, takes the packed tensors; any other module's parameter that is packed in the file (the experts of a
    mixture) stays packed and is decoded whenever the module reads it. Adapters are left as they are. The module
    may be on the meta device. Weights that are tied in the module stay tied, whether the file has them once or, equal,
    under each name.

    Args:
        module: any nn.Module, changed in place; unchanged after an error.
        directory: a checkpoint directory (sharded or not), or one .safetensors file.
        strict: whether a tensor that is only in the file, or only in the module, is an error.

    Returns:
        Names that only one side has; empty if `strict`.

    Raises:
        CheckpointNotFoundError: the directory, a shard, or any safetensors in it is missing.
        CheckpointError: a damaged file, a tensor that does not fit, or (if `strict`) names that only one side has.
    """
    source = open_source(directory)
    plan = _Plan(module, Reader(source, "cpu"))
    plan.quantized()
    plan.packed()
    plan.plain()
    odd = plan.left_over()
    if strict and odd:
        shown = ", ".join(odd[:_SHOWN]) + (f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else "")
        raise CheckpointError(f"{source.root}: {shown}")
    for step in plan.steps:
        step()
    return odd


@dataclass
class _Plan:
    """What will be done, once all of it is known to be possible."""

    module: nn.Module
    reader: Reader
    steps: list[Callable[[], None]] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)  # names of the file
    given: set[str] = field(default_factory=set)  # names of the module, as `_targets` has them

    def __post_init__(self) -> None:
        source: Source = self.reader.source
        self._groups = group(source.tensors, str(source.root))
        # By name, adapters passed over: of an Adapted and its base, the base, which comes later.
        found = [(name, path, module) for name, path, module in base_modules(self.module)]
        self._modules = {name: module for name, _, module in found}
        self._paths = {name: path for name, path, _ in found}
        self._targets = _targets(self.module)

    def quantized(self) -> None:
        """Plan the weights that are quantized in the file."""
        new: dict[int, QuantLinear] = {}
        for path, members in self._groups.quantized.items():
            where = self.reader.where(members["weight"])
            layer = self._modules.get(path)
            if not isinstance(layer, (nn.Linear, QuantLinear)):
                what = "nothing" if layer is None else f"a {type(layer).__name__}, not a linear layer,"
                raise CheckpointError(f"{where} is quantized, but the module has {what} at {path!r}")
            state = {key: self.reader(name) for key, name in members.items()}
            dtype = _float_dtype(layer) if "SCB" in members else None
            tensor = QuantTensor.from_state(state, name=where, dtype=dtype)
            if tensor.shape != (layer.out_features, layer.in_features):
                want = [layer.out_features, layer.in_features]
                raise CheckpointError(f"{where} has shape {list(tensor.shape)}, the module wants {want}")
            self.taken.update(members.values())
            self.given.add(f"{prefix_of(path)}weight")
            new[id(layer.weight)] = self._place(path, layer, tensor)
        for path, layer in self._modules.items():  # layers that share a weight which the file has under one name
            if not isinstance(layer, (nn.Linear, QuantLinear)) or f"{prefix_of(path)}weight" in self.given:
                continue
            first = new.get(id(layer.weight)) if layer.weight is not None else None
            if first is not None and f"{prefix_of(path)}weight" not in self._groups.plain:
                self._share(path, layer, first)

    def packed(self) -> None:
        """Plan the packed parameters of modules that are no linear layers."""
        for name, members in self._groups.others.items():
            where = self.reader.where(members["weight"])
            path, _, leaf = name.rpartition(".")
            owner = self._modules.get(path)
            present = {} if owner is None else packed_parameters(owner)
            old = None if owner is None else owner._parameters.get(leaf)
            if owner is None or (old is None and leaf not in present):
                raise CheckpointError(f"{where} is quantized, but the module has no parameter {name!r}")
            shape, dtype = (present[leaf].shape, present[leaf].dtype) if old is None else (tuple(old.shape), old.dtype)
            state = {key: self.reader(of) for key, of in members.items()}
            tensor = QuantTensor.from_state(state, name=where)
            if tuple(tensor.shape) != shape:
                raise CheckpointError(f"{where} has shape {list(tensor.shape)}, the module wants {list(shape)}")
            self.taken.update(members.values())
            self.given.add(name)
            self.steps.append(partial(keep_packed, owner, leaf, tensor, dtype))

    def _share(self, path: str, layer: nn.Linear | QuantLinear, first: QuantLinear) -> None:
        self.given.add(f"{prefix_of(path)}weight")
        if isinstance(layer, QuantLinear):
            self.steps.append(lambda: layer.share_weight(first))
            return
        shared = QuantLinear(layer.in_features, layer.out_features).train(layer.training)
        shared.bias = layer.bias
        if layer.bias is not None:
            self._targets[f"{prefix_of(path)}bias"] = [(shared, "bias")]
        self.steps += [lambda: shared.share_weight(first), lambda: set_module(self.module, self._paths[path], shared)]

    def _place(self, path: str, layer: nn.Linear | QuantLinear, tensor: QuantTensor) -> QuantLinear:
        if isinstance(layer, QuantLinear):
            self.steps.append(lambda: layer.load_quant_tensor(tensor))
            return layer
        if not self._paths[path]:
            raise CheckpointError("module: a bare nn.Linear cannot be replaced in place; give a QuantLinear")
        new = QuantLinear.from_quant_tensor(tensor, bias=layer.bias).train(layer.training)
        self.steps.append(lambda: set_module(self.module, self._paths[path], new))
        if layer.bias is not None:  # goes to the layer that is there by then
            self._targets[f"{prefix_of(path)}bias"] = [(new, "bias")]
        return new

    def plain(self) -> None:
        """Plan the other tensors."""
        for name, places in self._targets.items():
            if name not in self._groups.plain or name in self.given:
                continue
            self.taken.add(name)
            self.given.add(name)
            owner, leaf = places[0]
            if isinstance(owner, QuantLinear) and leaf == "weight":
                raise CheckpointError(f"{self.reader.where(name)} is not quantized, but the module has a QuantLinear")
            if leaf in packed_parameters(owner):
                raise CheckpointError(f"{self.reader.where(name)} is not quantized, but the module has it packed")
            old = _own(owner, leaf)
            value = self.reader(name)
            if value.shape != old.shape:
                raise CheckpointError(
                    f"{self.reader.where(name)} has shape {list(value.shape)}, the module wants {list(old.shape)}"
                )
            if value.dtype != old.dtype:
                if not (value.is_floating_point() and old.is_floating_point()):
                    raise CheckpointError(
                        f"{self.reader.where(name)} has dtype {value.dtype}, the module wants {old.dtype}"
                    )
                value = value.to(old.dtype)
            self._tie(name, old, value, places)

    def _tie(self, name: str, old: Tensor, value: Tensor, places: list[tuple[nn.Module, str]]) -> None:
        """One parameter for all names that share it now."""
        new: Any = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        everywhere = list(places)
        if isinstance(old, nn.Parameter):
            for other, others in self._targets.items():
                if other == name or _own(*others[0]) is not old:
                    continue
                everywhere += others
                self.given.add(other)
                if other in self._groups.plain:
                    self.taken.add(other)
                    twin = self.reader(other)
                    if twin.shape != value.shape or not torch.equal(twin.to(value.dtype), value):
                        raise CheckpointError(
                            f"{self.reader.where(other)} differs from {name!r}, to which the module ties it"
                        )
        self.steps += [partial(_assign, owner, leaf, new) for owner, leaf in everywhere]

    def left_over(self) -> list[str]:
        """Names that only one side has, each with the side."""
        missing = [f"{name!r} is not in the file" for name in self._targets if name not in self.given]
        extra = [f"{name!r} is not in the module" for name in self.reader.source.tensors if name not in self.taken]
        return missing + extra


def _targets(module: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Name in the file -> where the module has it: parameters and persistent buffers, without adapters."""
    result: dict[str, list[tuple[nn.Module, str]]] = {}

    def walk(owner: nn.Module, prefix: str) -> None:
        if isinstance(owner, Adapted):
            base = owner.unwrapped()
            if base is not None:
                walk(base, prefix)
            return
        if isinstance(owner, QuantLinear):
            result[f"{prefix}weight"] = [(owner, "weight")]
            if owner.bias is not None:
                result[f"{prefix}bias"] = [(owner, "bias")]
            return
        names = [name for name, value in owner._parameters.items() if value is not None]
        packed = packed_parameters(owner)
        names += packed
        names += [
            name
            for name, value in owner._buffers.items()
            if value is not None and name not in owner._non_persistent_buffers_set
        ]
        for name in names:
            result[f"{prefix}{name}"] = [(owner, name)]
        for name, child in owner._modules.items():
            if child is not None and not (packed and name == "parametrizations"):
                walk(child, f"{prefix}{name}.")

    walk(module, "")
    return result


def _own(owner: nn.Module, leaf: str) -> Any:
    found = owner._parameters.get(leaf)
    return owner._buffers.get(leaf) if found is None else found


def _assign(owner: nn.Module, leaf: str, value: Any) -> None:
    (owner._parameters if isinstance(value, nn.Parameter) else owner._buffers)[leaf] = value


def _float_dtype(layer: nn.Linear | QuantLinear) -> torch.dtype:
    return layer.dtype if isinstance(layer, QuantLinear) else layer.weight.dtype
