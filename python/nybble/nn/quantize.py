"""Whole models: swap linear layers for quantized ones, in place, and report what was done and what not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import QuantConfig, match_module
from ..reference import check_float
from ..tensor import QuantTensor
from .adapters import Adapted
from .experts import computed_parameters
from .linear import QuantLinear
from .names import base_modules, patterns_of, require_matches, set_module, weight_owners


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
    patterns = patterns_of(skip or ())
    paths = _without_update(module)
    linears = {name: linear for name, (_, linear) in paths.items()}
    require_matches("skip", patterns, linears)
    require_matches("config.overrides", config.overrides, linears)
    plan, skipped = _plan(module, linears, config, patterns)
    for name, (linear, chosen) in plan.items():
        _require_quantizable(linear.weight, chosen, f"{name}.weight")
    return _replace_linears(module, paths, plan, skipped)


def _without_update(module: nn.Module) -> dict[str, tuple[str, nn.Linear]]:
    """Name -> (path, layer) of the linear layers that nothing has been put around."""
    found, bases = {}, set()
    for name, path, layer in base_modules(module):
        if isinstance(layer, Adapted):
            bases.add(id(getattr(layer, "base", None)))
        elif name and isinstance(layer, nn.Linear) and id(layer) not in bases:
            found[name] = path, layer
    return found


def _plan(
    module: nn.Module, linears: dict[str, nn.Linear], config: QuantConfig, patterns: tuple[str, ...]
) -> tuple[dict[str, tuple[nn.Linear, QuantConfig]], dict[str, str]]:
    owners = weight_owners(module)
    direct = read_directly(module)
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


def read_directly(module: nn.Module) -> dict[str, str]:
    """Linear layers whose weights torch's own modules read past the layer's forward, and why they stay."""
    found = {}
    for name, _, layer in base_modules(module):
        if isinstance(layer, nn.TransformerEncoderLayer):
            for child in ("linear1", "linear2"):
                full = f"{name}.{child}" if name else child
                found[full] = "nn.TransformerEncoderLayer reads its weight directly"
    return found


def _replace_linears(
    module: nn.Module,
    paths: dict[str, tuple[str, nn.Linear]],
    plan: dict[str, tuple[nn.Linear, QuantConfig]],
    skipped: dict[str, str],
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
        set_module(module, paths[name][0], layers[id(linear)])
    return QuantizeReport(list(plan), skipped, parameters, before, after, tied)


def _require_quantizable(weight: Tensor, config: QuantConfig, name: str) -> None:
    """Everything that quantizing could raise, before any layer is replaced."""
    check_float(weight, name)
    low, high = torch.aminmax(weight) if weight.numel() else (weight.sum(), weight.sum())
    largest = torch.maximum(low.abs(), high.abs())
    if not bool(torch.isfinite(largest if config.is_4bit else largest.half())):
        QuantTensor.quantize(weight, config, name)  # raises, and says where


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
