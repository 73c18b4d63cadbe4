"""Which tensors of a checkpoint are weights of linear layers, and how each is quantized.

With config.json and transformers at hand the model's skeleton is built on the meta device and its modules say what they
are. Otherwise names decide: a two-dimensional `*.weight` is a linear layer's unless a part of its path says embedding,
normalization or router, or its model type keeps weights transposed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import CheckpointError, PatternError
from ..formats import QuantConfig, match_module
from .bnb import group, module_of, source_quantization
from .files import Source, TensorInfo
from .slabs import FP8_DTYPES

if TYPE_CHECKING:
    from .load import Architecture

QUANTIZABLE_DTYPES = ("F64", "F32", "F16", "BF16", *FP8_DTYPES)
# How config.json calls checkpoints that hold fp8 weights with scales, which are weights to quantize all the same.
_FP8_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
_ACTIVATION_SCALE = re.compile(r".*\.(input|activation|output|k|v|q)_scale(_ub)?$")
_EMBEDDING_NAMES = {"wte", "wpe", "shared", "relative_attention_bias"}
_ROUTER_NAMES = {"gate", "router", "shared_expert_gate"}
# GPT-2 and its kin hold [in, out] matrices (transformers' Conv1D): not a Linear's weight.
_TRANSPOSED_TYPES = {"gpt2", "openai-gpt", "ctrl", "imagegpt", "decision_transformer"}
_TRANSPOSED_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}
_DEFAULT_SKIP = set(QuantConfig().skip)


@dataclass
class Selection:
    """What becomes of each tensor.

    Attributes:
        settings: tensor name -> how to quantize it. not_converted: linear modules left as they are.
        scales: name of an fp8 weight -> its scales, None if it has none; tile: rows and columns that share one.
        fused_experts: there are matrices of single experts that transformers makes one parameter of.
        dropped: names of tensors that say how the source is quantized, and are not carried along.
    """

    settings: dict[str, QuantConfig] = field(default_factory=dict)
    scales: dict[str, TensorInfo | None] = field(default_factory=dict)
    tile: tuple[int, int] = (128, 128)
    dropped: set[str] = field(default_factory=set)
    not_converted: list[str] = field(default_factory=list)
    fused_experts: bool = False
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
    fp8 = any(info.dtype in FP8_DTYPES for info in source.tensors.values())
    packed = any(name.endswith(".weight_packed") for name in source.tensors)
    if method is not None and not (method in _FP8_METHODS and fp8 and not packed):
        raise CheckpointError(f"{source.root / 'config.json'}: the checkpoint is already quantized (by {method})")
    groups = group(source.tensors, str(source.root))
    if groups.quantized or groups.others:
        key = next(iter({**groups.quantized, **groups.others}.values()))["weight"]
        raise CheckpointError(f"{source.tensors[key].path}: tensor {key!r} is already quantized")


def _find_scales(source: Source, result: Selection) -> None:
    """Pair fp8 weights with their scales.

    Raises:
        CheckpointError: config.json says that there are scales, or a name beside the weight does, but none is found.
    """
    method = source_quantization(source.config())
    for name, info in source.tensors.items():
        if info.dtype not in FP8_DTYPES:
            if method is not None and _ACTIVATION_SCALE.match(name):
                result.dropped.add(name)
            continue
        scale = next((s for s in (f"{name}_scale_inv", f"{name}_scale") if s in source.tensors), None)
        if scale is None and method is not None:
            raise CheckpointError(
                f"{info.path}: tensor {name!r} is {info.dtype}, but neither {name}_scale_inv nor {name}_scale is there"
            )
        result.scales[name] = None if scale is None else source.tensors[scale]
        if scale is not None:
            result.dropped.add(scale)
    _refuse_other_scales(source, result)
    size = ((source.config() or {}).get("quantization_config") or {}).get("weight_block_size")
    if size is not None:
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
            raise CheckpointError(f"{source.root / 'config.json'}: weight_block_size is {size!r}, not two sizes")
        result.tile = (size[0], size[1])


def _refuse_other_scales(source: Source, result: Selection) -> None:
    """Whatever else is called a scale beside an fp8 weight would have to be applied, in a way that is not known."""
    beside: dict[str, list[str]] = {}
    for name, info in source.tensors.items():
        owner, _, leaf = name.rpartition(".")
        known = name in result.dropped or _ACTIVATION_SCALE.match(f".{leaf}") or info.dtype in FP8_DTYPES
        if "scale" in leaf.lower() and not known:
            beside.setdefault(owner, []).append(name)
    for name, scale in result.scales.items():
        others = beside.get(name.rpartition(".")[0], [])
        other = next((o for o in others if scale is None or o.startswith(f"{name}_")), None)
        if other is not None:
            info = source.tensors[name]
            raise CheckpointError(
                f"{info.path}: tensor {name!r} is {info.dtype}, and what its scale {other!r} means is not known; "
                f"{name}_scale_inv and {name}_scale are"
            )


def is_experts(name: str, info: TensorInfo) -> bool:
    """Whether a tensor holds the matrices of all experts of a layer, [experts, rows, columns]."""
    return len(info.shape) == 3 and "experts" in name.split(".") and not name.endswith("bias") and info.numel > 0


def _check_patterns(config: QuantConfig, modules: list[str]) -> None:
    patterns = [(p, "skip") for p in config.skip if p not in _DEFAULT_SKIP]
    patterns += [(p, "overrides") for p in config.overrides] + [(p, "include") for p in config.include]
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
        PatternError: a pattern of `config.skip`, `config.include` or `config.overrides` matches nothing.
    """
    _refuse_quantized(source)
    result = Selection()
    _find_scales(source, result)
    architecture = _architecture(source, result.notes)
    model_type = (source.config() or {}).get("model_type")
    modules, by_name, fused = {}, 0, 0
    for name, info in source.tensors.items():
        if is_experts(name, info):
            modules[name] = name.removesuffix(".weight")
            continue
        if name in result.dropped:
            continue
        if len(info.shape) != 2 or info.numel == 0 or (name != "weight" and not name.endswith(".weight")):
            continue
        module = module_of(name)
        known = architecture.names.resolve_module(module, architecture.modules) if architecture else None
        if architecture is not None and known is not None:
            linear = known in architecture.linear
        elif architecture is not None and architecture.names.is_fused(name):
            linear = "experts" in module.split(".")  # each is packed by itself; loaders fuse the packed ones
            result.fused_experts |= linear
            fused += not linear
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
        elif setting is not None and not setting.is_4bit and len(source.tensors[name].shape) != 2:
            left_out.setdefault("int8 takes matrices, it has three dimensions", []).append(name)
        elif setting is not None and dtype not in QUANTIZABLE_DTYPES:
            left_out.setdefault(f"its dtype is {dtype}", []).append(name)
        elif setting is not None:
            result.settings[name] = setting
    for reason, names in left_out.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        result.notes.append(f"{names[0]}{more} left as it is: {reason}")
    if fused:
        result.notes.append(f"{fused} weights left as they are: transformers fuses them with others while loading")
    if by_name:
        result.notes.append(f"{by_name} linear weights have no counterpart in the model class: their names decided")
    if not result.settings:
        raise CheckpointError(f"{source.root}: no weight of a linear layer to quantize (skip={list(config.skip)})")
    scaled = sum(scale is not None for scale in result.scales.values())
    for count, how in (
        (scaled, "were decoded by their scales"),
        (len(result.scales) - scaled, "have no scales: their values were taken as they are"),
    ):
        if count:
            result.notes.append(f"{count} fp8 weights {how}; those not quantized are bf16 now")
    converted = {modules[name] for name in result.settings}
    left = set(architecture.linear | architecture.transposed) if architecture else set(modules.values())
    if "lm_head" not in converted and architecture is None:
        left.add("lm_head")  # a tied head is no tensor of the file, but readers would convert its module
    result.not_converted = sorted(left - converted)
    return result
