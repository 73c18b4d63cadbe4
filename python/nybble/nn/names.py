"""Paths of a model's modules, with adapters around them or without: a layer keeps its name when it gets an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import PatternError
from ..formats import match_module
from .adapters import Adapted


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule with the dotted `path`."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def base_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(name, path, module) of the model's modules without what belongs to adapters.

    The name is the path that the module would have if the model had no adapters: what stands in an `Adapted`'s `base`
    has its name. A module with two paths comes under both, an `Adapted` before its base.
    """
    stack: list[tuple[str, str, nn.Module]] = [("", "", model)]
    while stack:
        name, path, module = stack.pop()
        yield name, path, module
        children = []
        for child, inner in module._modules.items():
            if inner is None or (isinstance(module, Adapted) and child == "adapters"):
                continue
            inner_path = f"{path}.{child}" if path else child
            if isinstance(module, Adapted) and child == "base":
                children.append((name, inner_path, inner))
            else:
                children.append((f"{name}.{child}" if name else child, inner_path, inner))
        stack += reversed(children)


def layers_of(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, tuple[str, Any]]:
    """Name -> (path, layer) of the model's own layers of these kinds, also of those that have adapters."""
    return {name: (path, module) for name, path, module in base_modules(model) if name and isinstance(module, kinds)}


def adapted_layers(model: nn.Module, kinds: tuple[type[Adapted], ...]) -> dict[str, Any]:
    """Name -> module around the layer, for modules of these kinds."""
    return {name: module for name, _, module in base_modules(model) if isinstance(module, kinds)}


def weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> its names, without those that adapters have."""
    owners: dict[int, list[str]] = {}
    for name, _, module in base_modules(model):
        for leaf, parameter in module._parameters.items():
            full = f"{name}.{leaf}" if name else leaf
            if parameter is not None and full not in owners.setdefault(id(parameter), []):
                owners[id(parameter)].append(full)
    return owners


def patterns_of(value: str | Iterable[str]) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches (`nybble.formats.match_module`)."""
    return any(match_module(name, pattern) for pattern in patterns)


def require_matches(argument: str, patterns: Iterable[str], names: Mapping[str, Any]) -> None:
    """Raises PatternError, naming the argument, for a pattern that matches none of the layers."""
    for pattern in patterns:
        if not any(match_module(name, pattern) for name in names):
            raise PatternError(f"{argument}: the pattern {pattern!r} matches none of {shown(names)}")


def shown(names: Mapping[str, Any]) -> str:
    """The first of these layers, for a message."""
    if not names:
        return "the linear layers: there are none"
    few = list(names)[:6]
    more = f" and {len(names) - len(few)} more" if len(names) > len(few) else ""
    return f"the linear layers {', '.join(few)}{more}"
