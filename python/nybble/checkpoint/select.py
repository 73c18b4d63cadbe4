"""Which tensors of a checkpoint are weights of linear layers, and how each is quantized.

With config.json and transformers at hand the model's skeleton is built on the meta device and its modules say what they
are. Otherwise names decide: a two-dimensional `*.weight` is a linear layer's unless a part of its path says embedding,
normalization or router, or its model type keeps weights transposed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import CheckpointError, PatternError
from ..formats import QuantConfig, match_module
from .bnb import group, module_of, source_quantization
from .files import Source

if TYPE_CHECKING:
    from .load import Architecture

QUANTIZABLE_DTYPES = ("F32", "F16", "BF16")
_EMBEDDING_NAMES = {"wte", "wpe", "shared", "relative_attention_bias"}
_ROUTER_NAMES = {"gate", "router", "shared_expert_gate"}
# GPT-2 and its kin hold [in, out] matrices (transformers' Conv1D): not a Linear's weight.
_TRANSPOSED_TYPES = {"gpt2", "openai-gpt", "ctrl", "imagegpt", "decision_transformer"}
_TRANSPOSED_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}
_DEFAULT_SKIP = set(QuantConfig().skip)


@dataclass
class Selection:
    """`settings`: tensor name -> how to quantize it; `not_converted`: linear modules left as they are."""

    settings: dict[str, QuantConfig] = field(default_factory=dict)
    not_converted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_linear_by_name(module: str, model_type: str | None = None) -> bool:
    """Whether the two-dimensional weight of `module` is, by its name, that of a linear layer."""
    parts = module.lower().split(".")
    if any("embed" in part and part != "embed_out" for part in parts) or _EMBEDDING_NAMES & set(parts):
        return False
    if any("norm" in part or part.startswith("ln_") for part in parts[-1:]) or parts[-1] in _ROUTER_NAMES:
        return False
    return not (model_type in _TRANSPOSED_TYPES and parts[-1] in _TRANSPOSED_NAMES)


def _architecture(source: Source, notes: list[str]) -> Architecture | None:
    if not (source.root / "config.json").is_file():
        notes.append("no config.json: linear layers were recognized by their names")
        return None
    from .load import describe

    try:
        return describe(source.root)
    # Whatever keeps this model class from being built (no transformers, an unknown or remote architecture, a config
    # that its class rejects) leaves names to decide, and the report says so.
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        notes.append(f"linear layers were recognized by their names, as the model could not be built ({reason})")
        return None


def _refuse_quantized(source: Source) -> None:
    method = source_quantization(source.config())
    if method is not None:
        raise CheckpointError(f"{source.root / 'config.json'}: the checkpoint is already quantized (by {method})")
    groups = group(source.tensors, str(source.root))
    if groups.quantized:
        key = next(iter(groups.quantized.values()))["weight"]
        raise CheckpointError(f"{source.tensors[key].path}: tensor {key!r} is already quantized")


def _check_patterns(config: QuantConfig, modules: list[str]) -> None:
    patterns = [(p, "skip") for p in config.skip if p not in _DEFAULT_SKIP] + [
        (p, "overrides") for p in config.overrides
    ]
    for pattern, argument in patterns:
        if not any(match_module(module, pattern) for module in modules):
            shown = ", ".join(modules[:3])
            raise PatternError(
                f"{argument}: pattern {pattern!r} matches no linear layer of the checkpoint ({shown} ...)"
            )


def select(source: Source, config: QuantConfig) -> Selection:
    """Decide for every tensor of `source` whether and how it is quantized.

    Raises:
        CheckpointError: the source is quantized already, or has no linear weight to quantize.
        PatternError: a pattern of `config.skip` or `config.overrides` matches nothing.
    """
    _refuse_quantized(source)
    result = Selection()
    architecture = _architecture(source, result.notes)
    model_type = (source.config() or {}).get("model_type")
    modules, by_name, fused = {}, 0, 0
    for name, info in source.tensors.items():
        if len(info.shape) != 2 or info.numel == 0 or (name != "weight" and not name.endswith(".weight")):
            continue
        module = module_of(name)
        known = architecture.names.resolve_module(module, architecture.modules) if architecture else None
        if architecture is not None and known is not None:
            linear = known in architecture.linear
        elif architecture is not None and architecture.names.is_fused(name):
            linear = False
            fused += 1
        else:
            linear = is_linear_by_name(module, model_type)
            by_name += architecture is not None and linear
        if linear:
            modules[name] = known or module
    _check_patterns(config, list(modules.values()))
    left_out: dict[str, list[str]] = {}
    for name, module in modules.items():
        setting = config.for_module(module)
        dtype = source.tensors[name].dtype
        if setting is not None and architecture is not None and module in architecture.keep:
            left_out.setdefault(architecture.keep[module], []).append(name)
        elif setting is not None and dtype not in QUANTIZABLE_DTYPES:
            left_out.setdefault(f"its dtype is {dtype}", []).append(name)
        elif setting is not None:
            result.settings[name] = setting
    for reason, names in left_out.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        result.notes.append(f"{names[0]}{more} left as it is: {reason}")
    if fused:
        result.notes.append(f"{fused} weights left as they are: transformers fuses them while loading (experts)")
    if by_name:
        result.notes.append(f"{by_name} linear weights have no counterpart in the model class: their names decided")
    if not result.settings:
        raise CheckpointError(f"{source.root}: no weight of a linear layer to quantize (skip={list(config.skip)})")
    converted = {modules[name] for name in result.settings}
    left = set(architecture.linear | architecture.transposed) if architecture else set(modules.values())
    if "lm_head" not in converted and architecture is None:
        left.add("lm_head")  # a tied head is no tensor of the file, but readers would convert its module
    result.not_converted = sorted(left - converted)
    return result
