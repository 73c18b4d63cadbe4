"""Whole models: swap linear layers for quantized ones, put LoRA beside them, and report what was done and what not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatternError
from ..formats import QuantConfig, match_module
from ..reference import check_float
from ..tensor import QuantTensor
from .experts import computed_parameters
from .linear import QuantLinear
from .lora import LoRALinear, check_lora_arguments

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_` did.

    Attributes:
        quantized: names of the layers that were replaced.
        skipped: name -> why, of the linear layers that were not.
        tied: name -> name of the layer whose packed weight it shares.
        parameters: weights in the replaced layers. bytes_before, bytes_after: of those weights with their scales.
    """

    quantized: list[str]
    skipped: dict[str, str]
    parameters: int
    bytes_before: int
    bytes_after: int
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes now, scales included; 0 when nothing was quantized."""
        return 8 * self.bytes_after / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        lines = [
            f"quantized {len(self.quantized)} layers, {self.parameters:,} weights, "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB, "
            f"{self.bits_per_weight:.3f} bits/weight"
        ]
        lines += [f"{name} shares the packed weight of {first}" for name, first in self.tied.items()]
        return "\n".join(lines + [f"kept {name}: {reason}" for name, reason in self.skipped.items()])


@dataclass(frozen=True)
class LoRAConfig:
    """Where and how `add_lora` puts low-rank updates.

    Attributes:
        r, alpha, dropout, rslora, init, dtype, dora: see `LoRALinear.from_base`.
        target: "all-linear", or one or more name patterns (`nybble.formats.match_module`: "q_proj", "*.mlp.*").
        exclude: patterns of layers that get none; by default the head ("lm_head") with "all-linear", else nothing.
        rank_pattern, alpha_pattern: name pattern -> r or alpha of the layers that match; the first match wins.
        modules_to_save: patterns of modules that are trained in full, as copies of their own where they are tied.
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
        object.__setattr__(self, "modules_to_save", _patterns(self.modules_to_save))
        for name in ("target", "exclude"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, value if name == "target" and value == ALL_LINEAR else _patterns(value))
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


def _patterns(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


# ---- quantize ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize_(
    module: nn.Module, config: QuantConfig | None = None, skip: Iterable[str] | None = None
) -> QuantizeReport:
    """Replaces every nn.Linear inside `module` by a QuantLinear, in place.

    Left alone, each with its reason in the report: what `config.skip` or `skip` matches, layers whose weight is tied
    to something that stays as it is (an embedding, a skipped layer), subclasses of nn.Linear and the feed-forward of
    nn.TransformerEncoderLayer (torch reads those weights directly). Linear layers that share one weight share one
    packed weight afterwards.

    Args:
        module: any nn.Module; a bare nn.Linear cannot be replaced in place.
        config: `QuantConfig()` by default.
        skip: name patterns (`nybble.formats.match_module`) in addition to `config.skip`.

    Raises:
        PatternError: a pattern of `skip` or of `config.overrides` matches no linear layer.
        NonFiniteError: a weight holds NaN or Inf (int8: or exceeds fp16).
        UnsupportedDtypeError: a weight is not fp32, fp16 or bf16.
        TypeError: `module` is itself an nn.Linear.
        After an error nothing has been changed.
    """
    if isinstance(module, nn.Linear):
        raise TypeError("module is an nn.Linear, which cannot be replaced in place; use QuantLinear.from_linear")
    config = QuantConfig() if config is None else config
    patterns = (skip,) if isinstance(skip, str) else tuple(skip or ())
    linears = dict(_named(module, (nn.Linear,)))
    _require_matches("skip", patterns, linears)
    _require_matches("config.overrides", tuple(config.overrides), linears)
    plan, skipped = _plan(module, linears, config, patterns)
    for name, (linear, chosen) in plan.items():
        _require_quantizable(linear.weight, chosen, f"{name}.weight")
    return _replace_linears(module, plan, skipped)


def _plan(
    module: nn.Module, linears: dict[str, nn.Linear], config: QuantConfig, patterns: tuple[str, ...]
) -> tuple[dict[str, tuple[nn.Linear, QuantConfig]], dict[str, str]]:
    owners = _weight_owners(module)
    direct = _read_directly(module)
    plan: dict[str, tuple[nn.Linear, QuantConfig]] = {}
    skipped: dict[str, str] = {}
    for name, linear in linears.items():
        chosen = config.for_module(name)
        others = [owner for owner in owners.get(id(linear.weight), []) if owner.rpartition(".")[0] not in linears]
        pattern = next((p for p in patterns if match_module(name, p)), None)
        if pattern is not None:
            skipped[name] = f"matches skip pattern {pattern!r}"
        elif chosen is None:
            skipped[name] = "the configuration skips it"
        elif type(linear) is not nn.Linear:
            skipped[name] = f"is a {type(linear).__name__}, a subclass of nn.Linear"
        elif name in direct:
            skipped[name] = direct[name]
        elif others:
            skipped[name] = f"its weight is tied to {', '.join(others)}"
        elif linear.weight.is_meta:
            skipped[name] = "its weight is on the meta device: there are no values to quantize"
        else:
            plan[name] = (linear, chosen)
    _skip_cut_ties(linears, plan, skipped)
    return plan, skipped


def _skip_cut_ties(
    linears: dict[str, nn.Linear], plan: dict[str, tuple[nn.Linear, QuantConfig]], skipped: dict[str, str]
) -> None:
    """Linear layers that share a weight are quantized together, alike, or not at all."""
    for name, (linear, config) in list(plan.items()):
        tied = [other for other, layer in linears.items() if other != name and layer.weight is linear.weight]
        for other in tied:
            if other not in plan:
                skipped[name] = f"its weight is tied to {other}, which stays as it is"
            elif plan[other][1] != config:
                skipped[name] = f"its weight is tied to {other}, which has another configuration"
    for name in skipped:
        plan.pop(name, None)


def _read_directly(module: nn.Module) -> dict[str, str]:
    """Linear layers whose weights torch's own modules read past the layer's forward, and why they stay."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            for child in ("linear1", "linear2"):
                full = f"{name}.{child}" if name else child
                found[full] = "nn.TransformerEncoderLayer reads its weight directly"
    return found


def _replace_linears(
    module: nn.Module, plan: dict[str, tuple[nn.Linear, QuantConfig]], skipped: dict[str, str]
) -> QuantizeReport:
    first: dict[int, tuple[str, QuantLinear]] = {}  # by weight: a shared one is quantized once
    layers: dict[int, QuantLinear] = {}  # by module: one module under two names stays one module
    tied: dict[str, str] = {}
    parameters = before = after = 0
    for name, (linear, config) in plan.items():
        weight = linear.weight
        if id(linear) not in layers and id(weight) not in first:
            tensor = QuantTensor.quantize(weight, config, f"{name}.weight")
            layer = QuantLinear.from_quant_tensor(tensor, linear.bias, config).train(linear.training)
            first[id(weight)], layers[id(linear)] = (name, layer), layer
            parameters += weight.numel()
            before += weight.numel() * weight.element_size()
            after += tensor.nbytes
        elif id(linear) not in layers:
            layer = QuantLinear(linear.in_features, linear.out_features, config).train(linear.training)
            layer.share_weight(first[id(weight)][1])
            layer.bias = linear.bias
            layers[id(linear)], tied[name] = layer, first[id(weight)][0]
        set_module(module, name, layers[id(linear)])
    return QuantizeReport(list(plan), skipped, parameters, before, after, tied)


def _require_quantizable(weight: Tensor, config: QuantConfig, name: str) -> None:
    """Everything that quantizing could raise, before any layer is replaced."""
    check_float(weight, name)
    low, high = torch.aminmax(weight) if weight.numel() else (weight.sum(), weight.sum())
    largest = torch.maximum(low.abs(), high.abs())
    if not bool(torch.isfinite(largest if config.is_4bit else largest.half())):
        QuantTensor.quantize(weight, config, name)  # raises, and says where


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def add_lora(model: nn.Module, config: LoRAConfig | None = None, **options: Any) -> LoRAReport:
    """Freezes `model` and puts a LoRALinear around the layers that `config.target` names, in place.

    Args:
        model: any nn.Module with QuantLinear or nn.Linear layers.
        config: a LoRAConfig; or give its fields as keywords.

    Raises:
        PatternError: a pattern of `target` matches no linear layer; the message lists layers that there are.
        ValueError: the model has LoRA layers already. TypeError: the model is itself a linear layer.
    """
    if isinstance(model, (QuantLinear, nn.Linear)):
        raise TypeError(
            f"model is a {type(model).__name__}, which cannot be replaced in place; use LoRALinear.from_base"
        )
    if config is None:
        config = LoRAConfig(**options)
    elif options:
        raise TypeError(f"give either config or its fields, not both: got {', '.join(options)} too")
    present = [name or "the model itself" for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    if present:
        raise ValueError(f"model has LoRA layers already ({present[0]} and {len(present) - 1} more)")
    layers = dict(_named(model, (QuantLinear, nn.Linear)))
    patterns = _patterns(config.target)
    everywhere = ALL_LINEAR in patterns
    excluded = (("lm_head",) if everywhere else ()) if config.exclude is None else config.exclude
    _require_matches("target", tuple(p for p in patterns if p != ALL_LINEAR), layers)
    _require_matches("rank_pattern", tuple(config.rank_pattern), layers)
    _require_matches("alpha_pattern", tuple(config.alpha_pattern), layers)
    full = _modules_to_save(model, config.modules_to_save)
    direct = _read_directly(model)

    def wanted(name: str, layer: nn.Module) -> bool:
        if type(layer) not in (QuantLinear, nn.Linear) or name in direct:
            return False  # its weight is, or may be, read directly, past the update
        if any(match_module(name, pattern) for pattern in (*excluded, *config.modules_to_save)):
            return False
        return everywhere or any(match_module(name, pattern) for pattern in patterns)

    targets = [name for name, layer in layers.items() if wanted(name, layer)]
    if not targets:
        raise PatternError(f"target {config.target!r} leaves no linear layer of {_some(layers)} (exclude: {excluded})")
    notes = [f"{name} shares its weight with {', '.join(tied)}" for name, tied in _ties(model, layers, targets)]
    model.requires_grad_(False)
    wrapped: dict[int, LoRALinear] = {}
    for name in targets:
        base = layers[name]
        if id(base) not in wrapped:
            wrapped[id(base)] = LoRALinear.from_base(
                base, *config.for_module(name), config.dropout, config.rslora, config.init, config.dtype, config.dora
            )
        set_module(model, name, wrapped[id(base)])
    for module in full:
        train_in_full(module)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return LoRAReport(targets, trainable, count_parameters(model), notes)


def _modules_to_save(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    """The outermost modules with these names; PatternError where there is none, TypeError where it is quantized."""
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        names = [name for name, _ in model.named_modules() if name and match_module(name, pattern)]
        if not names:
            raise PatternError(f"modules_to_save: pattern {pattern!r} matches no module of {type(model).__name__}")
        for name in names:
            module = model.get_submodule(name)
            if any(isinstance(inner, QuantLinear) or computed_parameters(inner) for inner in module.modules()):
                raise TypeError(f"modules_to_save: {name} is quantized, and cannot be trained in full")
            found[name] = module
    return [module for name, module in found.items() if not any(name.startswith(f"{other}.") for other in found)]


def train_in_full(module: nn.Module) -> None:
    """Makes every parameter of `module` trained, and its own: one that is tied to another module's is copied."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                inner._parameters[name] = nn.Parameter(parameter.detach().clone())


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model as people count them: a packed weight counts its elements; scales do not count."""
    total = 0
    seen: set[int] = set()
    for module in model.modules():
        for name, decoder in computed_parameters(module).items():
            held: Any = module.parametrizations
            seen.add(id(held[name].original))
            total += math.prod(decoder.shape)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if not isinstance(module, QuantLinear) or name == "bias":
                total += parameter.numel()
            elif name == "weight":
                total += module.in_features * module.out_features
    return total


# ---- names ---------------------------------------------------------------------------------------------------------


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule with the dotted `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _named(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, Any]]:
    """All names of the submodules of these kinds, a module with two names under both; not inside LoRALinear."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(inside) and inside:
            continue
        if name and isinstance(module, kinds):
            yield name, module
        if isinstance(module, LoRALinear):
            inside = (*inside, f"{name}." if name else "")


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _ties(model: nn.Module, layers: dict[str, Any], targets: list[str]) -> Iterator[tuple[str, list[str]]]:
    owners = _weight_owners(model)
    for name in targets:
        tied = [owner for owner in owners.get(id(layers[name].weight), []) if owner.rpartition(".")[0] != name]
        if tied:
            yield name, tied


def _require_matches(argument: str, patterns: tuple[str, ...], names: dict[str, Any]) -> None:
    for pattern in patterns:
        if not any(match_module(name, pattern) for name in names):
            raise PatternError(f"{argument}: the pattern {pattern!r} matches none of {_some(names)}")


def _some(names: dict[str, Any]) -> str:
    if not names:
        return "the linear layers: there are none"
    shown = list(names)[:6]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"the linear layers {', '.join(shown)}{more}"


__all__ = [
    "ALL_LINEAR",
    "LoRAConfig",
    "LoRAReport",
    "QuantizeReport",
    "add_lora",
    "count_parameters",
    "quantize_",
    "set_module",
    "train_in_full",
]
