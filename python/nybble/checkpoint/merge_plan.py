"""Which tensor of a merged checkpoint is made how: what the adapter and the formats asked for say of each.

`nybble.checkpoint.merging` runs it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, PatternError
from ..formats import QuantConfig, match_module
from . import bnb
from .absorb import AbsorbSink
from .adapter import WEIGHTS_NAME, AdapterFile, AdapterLayer, match_names
from .files import DTYPE_NAMES, Source, TensorInfo
from .select import select
from .slabs import (
    CHUNK,
    FLOAT_DTYPES,
    ErrorSums,
    PlainReader,
    PlainSink,
    QuantSink,
    Reader,
    copy,
    least_memory,
    pump,
)
from .stream import carried_files
from .task import Output, Task
from .update import FiniteReader, MergedReader, Update
from .weights import Weights
from .writer import Slot

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUANTIZED = ("nf4", "fp4", "int4", "int8")
ABSORBING = ("nf4", "fp4", "int4")

_HEAD = "lm_head.weight"
# What model classes call the table of the embedding that such a head may share.
_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")


class MergePlan:
    """Which tensor of the result is made how."""

    def __init__(
        self,
        base: Source,
        onto: Source | None,
        adapter: AdapterFile,
        to: str | None,
        block_size: int | None,
        search: str,
        factor: float = 1.0,
        absorb: bool = False,
    ) -> None:
        """`to`: None keeps the dtypes of the base's plain weights."""
        self._absorb = absorb
        self.base, self.onto, self.adapter, self._to, self._factor = base, onto, adapter, to, factor
        self.notes: list[str] = []
        self._weights = Weights(base)
        self._originals = None if onto is None else Weights(onto)
        self._used: dict[str, QuantConfig] = {}
        self._settings = self._choose(block_size, search)
        if absorb and to not in ABSORBING:
            raise ValueError(f"absorb is for a 4-bit result ({', '.join(ABSORBING)}); to is {to!r}")
        if absorb and (onto is not None or not self._weights.packed):
            # Measured (SmolLM2, a LoRA of 60 steps): nearest codes 12.4, absorbed 21.3 onto the original weights; 17.4
            # and 14.8 onto the dequantized ones. Weights that lie off the grid carry an update through rounding.
            raise ValueError("absorb is for the dequantized weights of a quantized base; original ones do without")
        self._original_of = self._match_originals()
        names = [f"{path}.weight" for path in adapter.layers] + list(adapter.saved)
        # A head that shares the embedding's table has no tensor of its own.
        absent = {name for name in names if _is_head(name) and name not in base.tensors and self._table() is not None}
        self._names = match_names([name for name in names if name not in absent], self._weights.shapes, base.root)
        self._changes, self._head = self._match()
        self._saved = self._match_saved()
        self.tasks = self._make()

    # ---- what is asked for -------------------------------------------------------------------------------------------

    def _choose(self, block_size: int | None, search: str) -> dict[str, QuantConfig]:
        """Weight name -> the format it is to have; empty for a plain result."""
        if self._to is None or self._to in PLAIN:
            if block_size is not None or search != "absmax":
                raise ValueError(f"block_size and search are for a quantized result; to is {self._to!r}")
            return {}
        config = QuantConfig(self._to, block_size or 64, search=search)
        if not self._weights.packed:
            selection = select(self.base, config)
            self.notes += selection.notes
            self._kept = selection.not_converted
            return selection.settings
        result, experts = {}, 0
        for name in self._weights.packed:
            reader = self._weights.quantized(name)
            found = reader.config
            if not config.is_4bit and len(reader.shape) != 2:
                result[name] = found
                experts += 1
                continue
            if config.is_4bit and found.is_4bit:
                result[name] = replace(
                    config, block_size=block_size or found.block_size, double_quant=found.double_quant
                )
            else:
                result[name] = config
        if experts:
            self.notes.append(f"{experts} weights stay in their 4-bit format: int8 takes matrices, they have more axes")
        block = (self.base.config() or {}).get("quantization_config") or {}
        self._kept = block.get("llm_int8_skip_modules") or block.get("modules_to_not_convert") or []
        return result

    def _match(self) -> tuple[dict[str, AdapterLayer], AdapterLayer | None]:
        """Weight name -> what the adapter does to it; and what it does to a head that has no tensor of its own."""
        file, shapes = self.adapter.directory / WEIGHTS_NAME, self._weights.shapes
        result: dict[str, AdapterLayer] = {}
        head = None
        for path, layer in self.adapter.layers.items():
            name, table = self._names.get(f"{path}.weight"), self._table()
            if name is None and table is not None and _is_head(f"{path}.weight"):
                self._check_shape(layer, table)
                head = layer
                continue
            if name is None:
                raise PatternError(f"{file}: {path!r}: {self.base.root} has no weight for it")
            if name in result:
                raise CheckpointError(
                    f"{file}: {result[name].path!r} and {path!r} would both change {name!r} in {self.base.root}"
                )
            self._check_shape(layer, name)
            result[name] = layer
        for name in result:
            if len(shapes[name]) != 2:
                raise CheckpointError(f"{file}: {result[name].path!r} is for a matrix; {name!r} is {shapes[name]}")
        return result, head

    def _check_shape(self, layer: AdapterLayer, name: str) -> None:
        shape = self._weights.shapes[name]
        if shape != layer.shape:
            raise CheckpointError(
                f"{layer.lora_A.path}: {layer.path!r} is for a weight {list(layer.shape)}; {name!r} in "
                f"{self.base.root} is {list(shape)}"
            )

    def _match_saved(self) -> dict[str, TensorInfo]:
        """Name in the base -> the full tensor that the adapter has for it; new names for modules that were tied."""
        shapes = self._weights.shapes
        named = self.adapter.settings["modules_to_save"] or []
        result: dict[str, TensorInfo] = {}
        for name, info in self.adapter.saved.items():
            found = self._names.get(name)
            if not any(f".{module}." in f".{name}" for module in ([named] if isinstance(named, str) else named)):
                # PEFT adds copies of the embeddings when an adapter is on one.
                self._require_same(name, found, info)
                continue
            if found is not None and shapes[found] != info.shape:
                raise CheckpointError(
                    f"{info.path}: tensor {info.name!r} has shape {list(info.shape)}, the base's {list(shapes[found])}"
                )
            if found is None and not name.endswith(("lm_head.weight", "lm_head.bias")):
                raise PatternError(f"{info.path}: tensor {info.name!r}: {self.base.root} has no tensor {name!r}")
            if found in result:
                raise CheckpointError(
                    f"{info.path}: {result[found or ''].name!r} and {info.name!r} would both be {found!r}"
                )
            result[found or name] = info
        return result

    def _require_same(self, name: str, found: str | None, info: TensorInfo) -> None:
        own = found or (self._table() if _is_head(name) else None)
        tensor = self.base.tensors.get(own or "")
        same = tensor is not None and tensor.shape == info.shape and tensor.dtype in FLOAT_DTYPES
        if tensor is None or not same or _error(PlainReader(tensor), PlainReader(info)):
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} is not the base's, and modules_to_save does not name it"
            )

    def _match_originals(self) -> dict[str, str]:
        """Quantized weight -> its name in `onto`."""
        if self._originals is None or self.onto is None:
            return {}
        if self._originals.packed:
            raise CheckpointError(f"{self.onto.root}: its weights are quantized; onto needs the original ones")
        found = match_names(list(self._weights.packed), self._originals.shapes, self.onto.root)
        for name in self._weights.packed:
            if name not in found:
                raise CheckpointError(
                    f"{self.onto.root}: there is no tensor {name!r}, which {self.base.root} has quantized"
                )
            shape, want = self._originals.shapes[found[name]], self._weights.shapes[name]
            if shape != want:
                where = f"{found[name]} ({self.onto.tensors[found[name]].path})"
                raise CheckpointError(f"{where} has shape {list(shape)}, the quantized one {list(want)}")
        return found

    def _table(self) -> str | None:
        """The embedding's tensor if the head shares it."""
        if not (self.base.config() or {}).get("tie_word_embeddings", False):
            return None
        return next((name for name in self._weights.shapes if name.endswith(_TABLES)), None)

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def _make(self) -> list[Task]:
        tasks = []
        for name, info in self.base.tensors.items():
            if name in self._saved:
                tasks.append(self._saved_tensor(name, self._saved[name]))
            elif name in self._weights.packed:
                tasks += self._quantized_weight(name)
            elif name not in self._weights.parts:
                tasks.append(self._plain_tensor(name, info))
        tasks += [self._saved_tensor(n, info) for n, info in self._saved.items() if n not in self.base.tensors]
        if any(task.name.endswith(_HEAD) for task in tasks):
            return tasks
        table = self._table()
        if table is not None and (self._head is not None or table in self._changes or table in self._saved):
            # The head shared the table, and the adapter changes only one of them.
            weights = self._weights
            tasks.append(
                self._weight(_HEAD, weights.nbytes(table), lambda: weights.reader(table), self._head, None, None)
            )
        return tasks

    def _quantized_weight(self, name: str) -> list[Task]:
        weights, originals = self._weights, self._originals
        layer, setting = self._changes.get(name), self._settings.get(name)
        kept = setting is not None and _same(weights.quantized(name).config, setting)
        if layer is None and kept and (originals is None or len(weights.shapes[name]) != 2):
            assert setting is not None
            self._used[name] = setting
            return [self._copy(self.base.tensors[member]) for member in weights.packed[name].values()]
        if originals is None:
            return [self._weight(name, weights.nbytes(name), lambda: weights.quantized(name), layer, setting, None)]
        original = self._original_of[name]
        return [
            self._weight(
                name,
                weights.nbytes(name),
                lambda: originals.reader(original),
                layer,
                setting,
                lambda: weights.quantized(name),
            )
        ]

    def _plain_tensor(self, name: str, info: TensorInfo) -> Task:
        layer, setting = self._changes.get(name), self._settings.get(name)
        if layer is None and setting is None and name not in self._weights.fp8:
            return self._copy(info)
        return self._weight(name, info.nbytes, lambda: self._weights.reader(name), layer, setting, None)

    def _copy(self, info: TensorInfo) -> Task:
        return Task(info.name, [Slot(info.name, info.dtype, info.shape)], info.nbytes, lambda out: copy(info, out))

    def _saved_tensor(self, name: str, info: TensorInfo) -> Task:
        """A full tensor of the adapter's, in the dtype that the base has or that is asked for."""
        own = self.base.tensors.get(name)
        dtype = PLAIN.get(self._to or "", torch.bfloat16)
        if own is not None and own.dtype in FLOAT_DTYPES and name not in self._changes:
            dtype = FLOAT_DTYPES[own.dtype]
        sink = PlainSink(name, dtype)

        def run(out: Output) -> dict[str, Any]:
            return pump(FiniteReader(PlainReader(info)), PlainSink(name, dtype), out, info.nbytes)

        least = least_memory(FiniteReader(PlainReader(info)), sink)
        return Task(name, sink.slots(info.shape), info.nbytes, run, *least)

    def _weight(
        self,
        name: str,
        nbytes: int,
        reader: Callable[[], Reader],
        layer: AdapterLayer | None,
        setting: QuantConfig | None,
        before: Callable[[], Reader] | None,
    ) -> Task:
        first = reader()
        dtype = first.dtype if self._to is None else PLAIN.get(self._to, first.dtype)
        if setting is not None:
            self._used[name] = setting

        def sink() -> PlainSink | QuantSink:
            if setting is None:
                return PlainSink(name, dtype)
            if self._absorb and layer is not None:
                return AbsorbSink(name, first.shape, dtype, setting, first.name, layer)
            return QuantSink(name, first.shape, dtype, setting, first.name)

        def run(out: Output) -> dict[str, Any]:
            source = reader()
            merged = source if layer is None else MergedReader(source, layer, self._factor)
            target = sink()
            figures = pump(merged, target, out, nbytes)
            if not isinstance(merged, MergedReader) or layer is None:
                return {}
            return {
                "name": name,
                "shape": list(source.shape),
                "format": setting.format_name if setting is not None else DTYPE_NAMES[dtype].lower(),
                "rank": layer.r,
                "update": merged.update,
                "base_error": None if before is None else _error(reader(), before()),
                "error": figures.get("relative_error"),
                "max_error": figures.get("max_error"),
            }

        target = sink()
        slots = target.slots(first.shape) if isinstance(target, PlainSink) else target.slots()
        fixed, widest = least_memory(first, target)
        if layer is not None:
            fixed, widest = fixed + Update.fixed(layer), widest + MergedReader.least(layer)
        return Task(name, slots, nbytes, run, fixed, widest)

    # ---- the other files ---------------------------------------------------------------------------------------------

    def files(self, report: Any) -> dict[str, bytes | Path]:
        """config.json as the result needs it, and what is carried along."""
        files = carried_files(self.base, report)
        settings = self.base.config()
        if settings is None:
            return files
        block = settings.pop("quantization_config", None)
        if self._to is not None and self._to in PLAIN:
            for key in ("torch_dtype", "dtype"):
                if key in settings:
                    settings[key] = str(PLAIN[self._to]).removeprefix("torch.")
        elif self._used and self._to is not None:
            dtype = str(settings.get("dtype") or settings.get("torch_dtype") or "bfloat16")
            experts = any(len(self._weights.shapes[name]) != 2 for name in self._used)
            settings["quantization_config"] = bnb.quantization_config(
                _settings_of(self._used, block), self._used.values(), dtype, self._kept, experts
            )
        changed = (
            {task.name for task in self.tasks} - self.base.tensors.keys() | self._changes.keys() | self._saved.keys()
        )
        if self._table() is not None and any(_is_head(name) or name == self._table() for name in changed):
            settings["tie_word_embeddings"] = False
            self.notes.append("the head shared the embedding's weight and has its own now")
        files["config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
        return files


def _is_head(name: str) -> bool:
    return name == _HEAD or name.endswith(f".{_HEAD}")


def _settings_of(used: Mapping[str, QuantConfig], block: Any) -> QuantConfig:
    """The settings that weights really have, as one configuration: the most frequent ones, and overrides for others.

    Args:
        block: the base's `quantization_config`, which may say what was skipped.
    """
    try:
        base = QuantConfig.from_dict(block["nybble"])
    except (KeyError, TypeError, ValueError):  # not by nybble, or not by this version of it
        base = QuantConfig()
    modules = {bnb.module_of(name) if name.endswith("weight") else name: setting for name, setting in used.items()}
    plain = {module: replace(setting, skip=(), include=(), overrides={}) for module, setting in modules.items()}
    common = Counter(plain.values()).most_common(1)[0][0]
    overrides: dict[str, Any] = {pattern: None for pattern, override in base.overrides.items() if override is None}
    for module, setting in plain.items():
        if setting != common:
            fields = ("format", "block_size", "double_quant", "search")
            overrides[module] = {field: getattr(setting, field) for field in fields}
    skip = tuple(pattern for pattern in base.skip if not any(match_module(module, pattern) for module in modules))
    return replace(common, skip=skip, include=base.include, overrides=overrides)


def _same(a: QuantConfig, b: QuantConfig) -> bool:
    """Whether two formats are the same bytes for the same weight."""
    if not a.is_4bit or not b.is_4bit:
        return a.is_4bit == b.is_4bit
    return (a.format, a.block_size, a.double_quant) == (b.format, b.block_size, b.double_quant)


def _error(exact: Reader, stored: Reader) -> float:
    """||exact - stored|| / ||exact||, a piece at a time."""
    sums = ErrorSums()
    numel = math.prod(exact.shape)
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        sums.add(exact.read(start, stop), stored.read(start, stop).clone())
    return sums.figures()[0]
