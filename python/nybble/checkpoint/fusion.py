"""Parameters that transformers builds from several tensors of a file while loading: the experts of a mixture in one."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..tensor import QuantTensor
from .architecture import Names
from .bnb import Groups, module_of
from .shard_reader import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Fusion:
    """A parameter that transformers builds from several tensors while loading: all experts of a layer in one.

    Attributes:
        path: of the parameter. shape, dtype: that the model wants. converter: transformers' own.
        sources: name of a tensor, or path of a quantized module -> which of the converter's patterns it is.
        paths: of quantized modules -> where they are in the model, relative to the module that has the parameter.
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    converter: Any
    config: Any
    sources: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """The parameter from its weights, by `paths`."""
        made = self.convert({module: values[path] for module, path in self.paths.items()})
        return next(iter(made.values()))

    def convert(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What transformers makes of `values`, by name; it takes them by the numbers in their names."""
        converter = copy.deepcopy(self.converter)
        for key in sorted(values, key=_numbers_by_value):
            converter.add_tensor(self.path, key, self.sources[key], values[key])
        made = converter.convert(self.path, model=None, config=self.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def checked(self, values: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The same; CheckpointError where the values do not go together."""
        try:
            return self.convert(values)
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{where} do not make up {self.path!r}: {error}") from error

    def place(self, model: nn.Module, groups: Groups, reader: Reader) -> None:
        """Let the parameter be made of its packed weights when it is used."""
        from ..nn.experts import FusedOnUse, keep_fused

        tensors: dict[str, QuantTensor] = {}
        for module, path in self.paths.items():
            members = groups.quantized[module]
            state = {key: reader(name) for key, name in members.items()}
            dtype = self.dtype if "SCB" in members else None
            tensors[path] = QuantTensor.from_state(state, name=reader.where(members["weight"]), dtype=dtype)
        where = f"{reader.where(groups.quantized[next(iter(self.paths))]['weight'])} and {len(self.paths) - 1} more"
        shapes = {m: torch.empty(tensors[p].shape, dtype=self.dtype, device="meta") for m, p in self.paths.items()}
        made = self.checked(shapes, where)
        found = [list(value.shape) for value in made.values()]
        if found != [list(self.shape)]:
            raise CheckpointError(f"{where} make {found[0]}, the model wants {list(self.shape)} for {self.path!r}")
        owner, _, leaf = self.path.rpartition(".")
        keep_fused(model.get_submodule(owner), leaf, FusedOnUse(tensors, self, self.shape, self.dtype))


def find_fusions(model: Any, names: Names, groups: Groups) -> dict[str, Fusion]:
    """Parameter of the model -> the quantized modules that transformers makes it of.

    Raises:
        CheckpointError: only some of its weights are quantized, or they are no part of the module that has it.
    """
    known = dict(model.named_parameters())
    modules = {name for name, _ in model.named_modules()}
    result: dict[str, Fusion] = {}
    for module, members in groups.quantized.items():
        found = None if names.resolve_module(module, modules) else names.fusion(members["weight"], known)
        if found is None:
            continue
        path, converter, pattern = found
        want = known[path]
        fusion = result.setdefault(path, Fusion(path, tuple(want.shape), want.dtype, converter, model.config))
        fusion.sources[module] = pattern
        inside = names.inside(members["weight"], path.rpartition(".")[0])
        if inside is None:
            raise CheckpointError(f"{module!r} is quantized, and {path!r}, which it is a part of, is not above it")
        fusion.paths[module] = module_of(inside)
    for key in groups.plain if result else ():
        found = names.fusion(key, known)
        if found is not None and found[0] in result:
            other = next(iter(result[found[0]].sources))
            raise CheckpointError(f"{other!r} is quantized and {key!r} is not, but {found[0]!r} is made of both")
    return result


def fused(
    model: PreTrainedModel, names: Names, fusion: Fusion, reader: Reader, known: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """The parameters that are made of plain tensors, by name; in memory of their own."""
    values = {}
    for key in fusion.sources:
        value = reader(key)
        values[key] = value.to(fusion.dtype) if value.is_floating_point() else value
    where = f"{reader.where(next(iter(fusion.sources)))} and {len(fusion.sources) - 1} more"
    for name, value in fusion.checked(values, where).items():
        full = names.resolve(name, known)
        want = None if full is None else tuple(model.get_parameter(full).shape)
        if full is None or tuple(value.shape) != want:
            raise CheckpointError(f"{where} make {name!r} {list(value.shape)}, the model wants {list(want or ())}")
        yield full, value


def _numbers_by_value(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
