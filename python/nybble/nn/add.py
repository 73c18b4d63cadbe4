"""Whole models: put LoRA and copies trained in full beside their layers, under a name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import PatternError
from ..formats import match_module
from .adapters import DEFAULT, Adapted, acting_parameters, check_name, freeze_base, set_adapter
from .copies import TrainedCopy
from .embedding import LoRAEmbedding
from .experts import computed_parameters
from .factors import check_lora_arguments
from .linear import QuantLinear
from .lora import LoRALinear
from .names import (
    adapted_layers,
    base_modules,
    layers_of,
    matches,
    patterns_of,
    require_matches,
    set_module,
    shown,
    weight_owners,
)
from .quantize import count_parameters, read_directly

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAConfig:
    """Where and how `add_lora` puts low-rank updates.

    Attributes:
        r, alpha, dropout, rslora, init, dtype, dora: see `LoRALinear.from_base`.
        target: "all-linear", or one or more name patterns (`nybble.formats.match_module`: "q_proj", "*.mlp.*") of
            linear layers and embeddings ("embed_tokens").
        exclude: patterns of layers that get none; by default the head ("lm_head") with "all-linear", else nothing.
        rank_pattern, alpha_pattern: name pattern -> r or alpha of the layers that match; the first match wins.
        modules_to_save: patterns of modules of which the adapter trains a copy in full.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target: str | tuple[str, ...] = ALL_LINEAR
    exclude: tuple[str, ...] | None = None
    rslora: bool = False
    init: str = "kaiming"
    dtype: torch.dtype = torch.float32
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_lora_arguments(self.r, self.alpha, self.dropout, self.init)
        for pattern in self.rank_pattern.keys() | self.alpha_pattern.keys():
            try:
                check_lora_arguments(
                    self.rank_pattern.get(pattern, self.r), self.alpha_pattern.get(pattern, self.alpha), 0.0, self.init
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"rank_pattern, alpha_pattern: {pattern!r}: {error}") from error
        object.__setattr__(self, "modules_to_save", patterns_of(self.modules_to_save))
        for name in ("target", "exclude"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(
                    self, name, value if name == "target" and value == ALL_LINEAR else patterns_of(value)
                )
        if not self.target:
            raise ValueError("target is empty; give 'all-linear' or name patterns")

    def for_module(self, name: str) -> tuple[int, float]:
        """(r, alpha) of the layer `name`."""
        r = next((v for p, v in self.rank_pattern.items() if match_module(name, p)), self.r)
        return r, next((v for p, v in self.alpha_pattern.items() if match_module(name, p)), self.alpha)


@dataclass(frozen=True)
class LoRAReport:
    """What `add_lora` did: names of the layers, numbers of trained and of all parameters, and remarks."""

    targets: list[str]
    trainable: int
    total: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.total)
        head = (
            f"LoRA on {len(self.targets)} layers: {self.trainable:,} of {self.total:,} parameters train ({share:.2f}%)"
        )
        return "\n".join([head, *self.notes])


# ---- what is chosen --------------------------------------------------------------------------------------------------


def add_lora(model: nn.Module, config: LoRAConfig | None = None, name: str = DEFAULT, **options: Any) -> LoRAReport:
    """Freezes `model` and puts LoRA beside the layers that `config.target` names, in place, as the adapter `name`.

    Adapters that are there already stay, and stay trainable; this one acts from now on (`set_adapter` chooses another,
    or one for each row of a batch).

    Args:
        model: any nn.Module with QuantLinear, nn.Linear or nn.Embedding layers.
        config: a LoRAConfig; or give its fields as keywords.
        name: of the adapter; letters, digits, _ and -.

    Raises:
        PatternError: a pattern of `target` matches no layer; the message lists layers that there are.
        ValueError: the model has LoRA or copies of this name already; or DoRA of an embedding is wanted.
        TypeError: the model is itself a linear layer, or a module to be trained in full is quantized.
        After an error nothing has been changed.
    """
    if isinstance(model, (QuantLinear, nn.Linear)):
        raise TypeError(
            f"model is a {type(model).__name__}, which cannot be replaced in place; use LoRALinear.from_base"
        )
    if config is None:
        config = LoRAConfig(**options)
    elif options:
        raise TypeError(f"give either config or its fields, not both: got {', '.join(options)} too")
    _require_free(model, name)
    targets = _targets(model, config)
    layers = layers_of(model, (QuantLinear, nn.Linear, nn.Embedding))
    notes = [f"{target} shares its weight with {', '.join(tied)}" for target, tied in _ties(model, layers, targets)]
    copied = modules_in_full(model, config.modules_to_save)
    freeze_base(model)
    put_lora(model, name, {target: config.for_module(target) for target in targets}, config)
    put_copies(model, name, copied)
    set_adapter(model, name)
    trainable = sum(p.numel() for p in acting_parameters(model).values())
    return LoRAReport(targets, trainable, count_parameters(model), notes)


def _require_free(model: nn.Module, name: str) -> None:
    check_name(name)
    kinds: tuple[type[Adapted], ...] = (LoRALinear, LoRAEmbedding, TrainedCopy)
    present = [at or "the model itself" for at, layer in adapted_layers(model, kinds).items() if name in layer.adapters]
    if present:
        raise ValueError(
            f"model has an adapter {name!r} already ({present[0]} and {len(present) - 1} more); give another name, or "
            "delete_adapter first"
        )


def _targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the layers that get LoRA; raises what `add_lora` says."""
    linears, tables = (
        {name: layer for name, (_, layer) in layers_of(model, kinds).items()}
        for kinds in ((QuantLinear, nn.Linear), (nn.Embedding,))
    )
    patterns = patterns_of(config.target)
    everywhere = ALL_LINEAR in patterns
    patterns = tuple(pattern for pattern in patterns if pattern != ALL_LINEAR)
    excluded = (("lm_head",) if everywhere else ()) if config.exclude is None else config.exclude
    for argument, wanted in (
        ("target", patterns), ("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)
    ):  # fmt: skip
        require_matches(argument, [p for p in wanted if not any(match_module(name, p) for name in tables)], linears)
    direct = read_directly(model)
    full = modules_in_full(model, config.modules_to_save)

    def is_target(name: str, layer: nn.Module) -> bool:
        if type(layer) not in (QuantLinear, nn.Linear, nn.Embedding) or name in direct:
            return False  # its weight is, or may be, read directly, past the update
        if matches(name, excluded) or _inside(name, full):
            return False
        return (everywhere and name in linears) or matches(name, patterns)

    targets = [name for name, layer in {**linears, **tables}.items() if is_target(name, layer)]
    if not targets:
        raise PatternError(f"target {config.target!r} leaves no linear layer of {shown(linears)} (exclude: {excluded})")
    for pattern in patterns:
        reached = [
            name for name in {**linears, **tables} if match_module(name, pattern) and not matches(name, excluded)
        ]
        if reached and not any(name in targets or _inside(name, full) for name in reached):
            kind = type({**linears, **tables}[reached[0]]).__name__
            raise PatternError(
                f"target: the pattern {pattern!r} reaches only layers that cannot have an update: {reached[0]}, a "
                f"{kind}, is of a subclass, or its weight is read directly"
            )
    embedded = [name for name in targets if name in tables]
    if embedded and config.dora:
        raise ValueError(f"dora: DoRA of an embedding ({embedded[0]}) is not supported; exclude it, or give it its own")
    order = {name: number for number, (name, _, _) in enumerate(base_modules(model))}
    return sorted(targets, key=order.__getitem__)


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def modules_in_full(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the outermost modules that match; PatternError where none does, TypeError where one is quantized."""
    modules = {name: module for name, _, module in base_modules(model) if name}  # the innermost of a name
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        names = [name for name in modules if match_module(name, pattern)]
        if not names:
            raise PatternError(f"modules_to_save: pattern {pattern!r} matches no module of {type(model).__name__}")
        for name in names:
            inner = modules[name].modules()
            if any(isinstance(module, QuantLinear) or computed_parameters(module) for module in inner):
                raise TypeError(f"modules_to_save: {name} is quantized, and cannot be trained in full")
            found[name] = modules[name]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _ties(model: nn.Module, layers: dict[str, Any], targets: list[str]) -> Iterator[tuple[str, list[str]]]:
    owners = weight_owners(model)
    for name in targets:
        tied = [owner for owner in owners.get(id(layers[name][1].weight), []) if owner.rpartition(".")[0] != name]
        if tied:
            yield name, tied


# ---- putting it there ------------------------------------------------------------------------------------------------


def put_lora(model: nn.Module, adapter: str, ranks: Mapping[str, tuple[int, float]], config: LoRAConfig) -> None:
    """Puts an adapter's low-rank updates beside the layers of these names; each has its (r, alpha)."""
    layers = layers_of(model, (QuantLinear, nn.Linear, nn.Embedding))
    around: dict[str, Any] = adapted_layers(model, (LoRALinear, LoRAEmbedding))
    made: dict[int, Any] = {}  # by layer: one that has two names stays one
    for name, (r, alpha) in ranks.items():
        path, layer = layers[name]
        module = around.get(name) or made.get(id(layer))
        if module is None:
            module = made[id(layer)] = LoRAEmbedding(layer) if isinstance(layer, nn.Embedding) else LoRALinear(layer)
        if name not in around:
            set_module(model, path, module)
        if adapter in module.adapters:
            continue
        if isinstance(module, LoRAEmbedding):
            module.add(adapter, r, alpha, config.rslora, config.dtype)
        else:
            module.add(adapter, r, alpha, config.dropout, config.rslora, config.init, config.dtype, config.dora)


def put_copies(model: nn.Module, adapter: str, names: Iterable[str]) -> dict[str, nn.Module]:
    """Puts an adapter's own copies, trained in full, beside the modules of these names; the copies by name."""
    around: dict[str, Any] = adapted_layers(model, (TrainedCopy,))
    outermost: dict[str, tuple[str, nn.Module]] = {}
    for name, path, module in base_modules(model):
        outermost.setdefault(name, (path, module))
    made: dict[int, Any] = {}
    result = {}
    for name in names:
        path, base = outermost[name]
        copies = around.get(name) or made.get(id(base))
        if copies is None:
            copies = made[id(base)] = TrainedCopy(base)
        if name not in around:
            set_module(model, path, copies)
        result[name] = copies.copy_of(adapter) if adapter in copies.adapters else copies.add(adapter)
    return result
