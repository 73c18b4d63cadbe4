"""The bitsandbytes layout at the level of names: which tensors of a file make up which quantized weight.

Layout: bitsandbytes 0.50, `<module>.weight.quant_state.bitsandbytes__nf4` and its siblings; formats that bitsandbytes
does not know are kept under `quant_state.nybble__<format>`, so that none of its readers mistakes them for its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import CheckpointError
from ..formats import QuantConfig
from .writer import Slot

_QUANT_STATE = re.compile(r"^(?P<base>.+?)\.quant_state\.(?P<writer>bitsandbytes|nybble)__(?P<format>\w+)$")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_BNB_4BIT = ("nf4", "fp4")
TEXT_LIMIT = 512  # bytes; the JSON of a quant_state takes about 200
JSON_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass
class Groups:
    """Keys of a state dict sorted by what they belong to.

    `quantized` maps a module path ("" for a bare weight) to {key inside the module: key in the state dict}, for 4-bit
    and int8 weights alike. `others` maps the full name of a packed parameter that is not called `weight` (the experts
    of a mixture) to the same, with "weight" standing for its name. `plain` lists every other key.
    """

    quantized: dict[str, dict[str, str]] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    others: dict[str, dict[str, str]] = field(default_factory=dict)


def module_of(key: str) -> str:
    """The module path of a `*.weight` key ("" for a bare "weight")."""
    return key[: -len("weight")].rstrip(".")


def prefix_of(module: str) -> str:
    """What precedes a module's own keys in a state dict."""
    return f"{module}." if module else ""


def group(keys: Iterable[str], where: str = "state dict") -> Groups:
    """Sort the keys of a bitsandbytes state dict into quantized weights and plain tensors.

    Args:
        keys: the names of the tensors.
        where: the file or directory they are from, for messages.

    Raises:
        CheckpointError: a quant_state without its weight, two quant_states for one weight, scales without a
            quant_state, or an int8 weight without its `weight`.
    """
    names = list(keys)
    known = set(names)
    groups = Groups()
    used: set[str] = set()
    for key in names:
        match = _QUANT_STATE.match(key)
        if match is None:
            continue
        base = match["base"]
        whole = base == "weight" or base.endswith(".weight")
        target, module = (groups.quantized, module_of(base)) if whole else (groups.others, base)
        if module in target:
            raise CheckpointError(f"{where}: tensor {base!r} has more than one quant_state")
        if base not in known or f"{base}.absmax" not in known:
            missing = base if base not in known else f"{base}.absmax"
            raise CheckpointError(f"{where}: tensor {missing!r} is missing beside {key!r}")
        members = {f"weight{key[len(base) :]}": key, "weight": base}
        members.update({f"weight.{part}": f"{base}.{part}" for part in _PARTS if f"{base}.{part}" in known})
        target[module] = members
        used.update(members.values())
    for key in names:
        if key in used or (key != "SCB" and not key.endswith(".SCB")):
            continue
        module = key[: -len("SCB")].rstrip(".")
        members = {part: prefix_of(module) + part for part in ("weight", "SCB", "weight_format")}
        if members["weight"] not in known:
            raise CheckpointError(f"{where}: tensor {members['weight']!r} is missing beside {key!r}")
        groups.quantized[module] = {part: name for part, name in members.items() if name in known}
        used.update(groups.quantized[module].values())
    groups.plain = [key for key in names if key not in used]
    for key in groups.plain:
        if key.endswith(tuple(f"weight.{part}" for part in _PARTS)):
            raise CheckpointError(f"{where}: tensor {key!r} has no quant_state beside it")
    return groups


def slots_for(name: str, shape: tuple[int, ...], config: QuantConfig) -> list[Slot]:
    """The tensors that the weight called `name`, quantized by `config`, will take in a file."""
    count = 1
    for size in shape:
        count *= size
    if not config.is_4bit:
        prefix = prefix_of(module_of(name))
        return [
            Slot(name, "I8", shape),
            Slot(f"{prefix}SCB", "F32", shape[:1]),
            Slot(f"{prefix}weight_format", "U8", ()),
        ]
    blocks = -(-count // config.block_size)
    owner = "bitsandbytes" if config.format_name in _BNB_4BIT else "nybble"
    result = [
        Slot(name, "U8", ((count + 1) // 2, 1)),
        Slot(f"{name}.absmax", "U8" if config.double_quant else "F32", (blocks,)),
        Slot(f"{name}.quant_map", "F32", (16,)),
        Slot(f"{name}.quant_state.{owner}__{config.format_name}", "U8", None, TEXT_LIMIT),
    ]
    if config.double_quant:
        result.append(Slot(f"{name}.nested_absmax", "F32", (-(-blocks // 256),)))
        result.append(Slot(f"{name}.nested_quant_map", "F32", (256,)))
    return result


def quantization_config(
    config: QuantConfig,
    used: Iterable[QuantConfig],
    compute_dtype: str,
    not_converted: list[str] | None,
    experts: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` block of config.json, for the formats that really occur in the file.

    `quant_method` is "bitsandbytes" only if bitsandbytes can read every weight (one of nf4, fp4, int8, not mixed), else
    "nybble". Our own settings are always under the key "nybble", which other readers ignore.

    Args:
        config: the settings as given.
        used: the settings of each quantized weight, after overrides.
        compute_dtype: "float32", "float16" or "bfloat16".
        not_converted: linear modules that stay as they are; None leaves the choice to the reader's default.
        experts: there are quantized weights of more than two dimensions, which transformers' readers do not expect.
    """
    settings = list(used)
    formats = {setting.format_name for setting in settings}
    own = {"nybble": stored(config).to_dict()}
    if experts or len(formats) != 1 or not formats <= {*_BNB_4BIT, "int8"}:
        return {"quant_method": "nybble", "modules_to_not_convert": not_converted, **own}
    name = formats.pop()
    four = name != "int8"
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": name if four else "fp4",
        "bnb_4bit_use_double_quant": four and any(setting.double_quant for setting in settings),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": not_converted,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
        **own,
    }


def stored(config: QuantConfig) -> QuantConfig:
    """`config` without what tells only how a layer computes: a file says what its bytes are."""
    how = ("compute", "outlier_threshold")
    overrides = {
        pattern: {k: v for k, v in override.items() if k not in how} if isinstance(override, Mapping) else override
        for pattern, override in config.overrides.items()
    }
    return replace(config, compute=None, outlier_threshold=None, overrides=overrides)


def source_quantization(config: Mapping[str, Any] | None) -> str | None:
    """The method by which a config.json says its weights are already quantized, if it does."""
    block = (config or {}).get("quantization_config")
    if not isinstance(block, Mapping):
        return None
    return str(block.get("quant_method") or "unknown")
