"""Merging an adapter into a checkpoint on disk: in pieces, resumable, into 16 bits or straight into a quantized format.

A merged weight is W + scaling * B A (DoRA: its rows scaled to the trained magnitudes), where W is what the adapter was
trained on: the dequantized weight of a quantized base, or the weight itself. Every other tensor is carried along.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import CheckpointError, PatternError
from ..formats import QuantConfig
from . import bnb
from .absorb import AbsorbSink
from .adapter import WEIGHTS_NAME, AdapterFile, AdapterLayer, read_adapter
from .files import DTYPE_NAMES, Source, TensorInfo, check_outside, open_source, read_tensor
from .job import Job, Output, Task
from .report import format_bytes
from .slabs import (
    CHUNK,
    FLOAT_DTYPES,
    ErrorSums,
    PlainReader,
    PlainSink,
    QuantizedReader,
    QuantSink,
    Reader,
    copy,
    least_memory,
    pump,
)
from .stream import Progress, carried_files, check_run_arguments, fingerprint, plan_digest, progress_bar
from .writer import Slot, Staging

if TYPE_CHECKING:
    from rich.table import Table

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUANTIZED = ("nf4", "fp4", "int4", "int8")
ABSORBING = ("nf4", "fp4", "int4")

# Rows that are multiplied at once, so that a row's bits do not depend on the piece that it is in.
_ROWS = 64


@dataclass(frozen=True)
class MergeRow:
    """One merged weight.

    Attributes:
        update: ||T - W|| / ||T||, where T is the exact sum. base_error: with `onto`, ||W0 - Wq|| / ||W0||, what the
            quantized base had lost of the original; else None. error: ||written - T|| / ||T||, None where T was only
            rounded to 16 or 32 bits. max_error: the largest |written - T|.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    rank: int
    update: float
    base_error: float | None = None
    error: float | None = None
    max_error: float | None = None


@dataclass
class MergeReport:
    """Returned by `nybble.merge`; `rows` are the weights that an adapter changed."""

    base: Path
    adapter: Path
    destination: Path
    rows: list[MergeRow] = field(default_factory=list)
    bytes_after: int = 0
    resumed: int = 0
    notes: list[str] = field(default_factory=list)
    perplexity: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON-able values."""
        return {
            "base": str(self.base),
            "adapter": str(self.adapter),
            "destination": str(self.destination),
            "bytes_after": self.bytes_after,
            "perplexity": self.perplexity,
            "notes": self.notes,
            "layers": [{**vars(row), "shape": list(row.shape)} for row in self.rows],
        }

    def write(self, path: Path) -> None:
        """Write the figures as JSON."""
        with Staging(path.parent) as staging:
            staging.write(path.name, (json.dumps(self.to_dict(), indent=2) + "\n").encode())
            staging.commit()

    def table(self) -> Table:
        """The closing table, for `rich.print`."""
        from rich.table import Table

        table = Table(show_header=False)
        table.add_column("what")
        table.add_column("value", justify="right")
        table.add_row("merged weights", f"{len(self.rows)}")
        table.add_row("format", ", ".join(sorted({row.format for row in self.rows})) or "-")
        for what, name in (
            ("mean update / weight", "update"),
            ("mean error of the quantized base", "base_error"),
            ("mean error after quantizing again", "error"),
        ):
            values = [value for row in self.rows if (value := getattr(row, name)) is not None]
            if values:
                table.add_row(what, f"{sum(values) / len(values):.4f} (largest {max(values):.4f})")
        table.add_row("size", format_bytes(self.bytes_after))
        for name, value in self.perplexity.items():
            table.add_row(f"perplexity, {name}", f"{value:.4f}")
        return table


class Update:
    """An adapter's change of a weight, applied to rows of it.

    Args:
        layer: the adapter's part for this weight.
        factor: 1 to merge, -1 to take away again.
    """

    def __init__(self, layer: AdapterLayer, factor: float = 1.0) -> None:
        a, b = layer.factors()
        if layer.kind == "embedding":
            a, b = b.T.contiguous(), a.T.contiguous()
        self._a, self._b = a, b * (layer.scaling * factor)
        self._magnitude = None if layer.magnitude is None else read_tensor(layer.magnitude).float().reshape(-1)

    @staticmethod
    def fixed(layer: AdapterLayer) -> int:
        """Bytes that it holds."""
        return 4 * (layer.lora_A.numel + layer.lora_B.numel) * 2

    def rows(self, weight: Tensor, first: int) -> Tensor:
        """weight: fp32 [rows, in], the rows from `first` on; returns the merged rows, fp32."""
        last = first + weight.shape[0]
        merged = torch.addmm(weight, self._b[first:last], self._a)
        if self._magnitude is not None:
            norms = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
            merged *= self._magnitude[first:last, None] / norms.clamp_min_(torch.finfo(torch.float32).tiny)
        return merged


class MergedReader:
    """A weight with an update on it."""

    def __init__(self, base: Reader, layer: AdapterLayer, factor: float = 1.0) -> None:
        self._base, self._update = base, Update(layer, factor)
        self.name, self.shape, self.dtype = base.name, base.shape, base.dtype
        self.fixed, self.bytes_per_element = base.fixed + Update.fixed(layer), base.bytes_per_element + 12
        self._difference = self._norm = 0.0

    def read(self, start: int, stop: int) -> Tensor:
        rows, width = self.shape
        first = start // width // _ROWS * _ROWS
        last = min(rows, math.ceil(math.ceil(stop / width) / _ROWS) * _ROWS)
        weight = self._base.read(first * width, last * width).view(-1, width)
        merged = torch.empty(last - first, width, dtype=torch.float32)
        for row in range(first, last, _ROWS):
            part = slice(row - first, min(row + _ROWS, last) - first)
            exact = weight[part].float()
            merged[part] = self._update.rows(exact, row)
            self._norm += float(torch.linalg.vector_norm(merged[part])) ** 2
            self._difference += float(torch.linalg.vector_norm(exact.sub_(merged[part]))) ** 2
        return merged.view(-1)[start - first * width : stop - first * width]

    @property
    def update(self) -> float:
        """||change|| / ||merged|| of what was read so far."""
        return (self._difference / self._norm) ** 0.5 if self._norm else 0.0

    @staticmethod
    def least(layer: AdapterLayer) -> int:
        """Bytes of the smallest piece beside those of the base's reader."""
        return 16 * _ROWS * layer.shape[1]


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str = "bf16",
    *,
    onto: str | os.PathLike[str] | None = None,
    block_size: int | None = None,
    search: str = "absmax",
    absorb: bool = False,
    max_shard_size: float = 5e9,
    max_memory: float | None = None,
    workers: int | None = None,
    restart: bool = False,
    progress: Progress | bool | None = None,
) -> MergeReport:
    """Merge a LoRA adapter (PEFT's layout) into a checkpoint directory, in bounded memory, resumable.

    Args:
        base: the directory that the adapter was trained on, quantized (bitsandbytes' layout) or plain.
        adapter: LoRA, rsLoRA or DoRA, with patterns, embeddings and modules_to_save.
        dst: a directory that is new or empty, or holds an unfinished run of the same call.
        to: "bf16", "fp16", "fp32": every quantized or merged weight is stored so; or "nf4", "fp4", "int4", "int8": the
            weights that are quantized in the base (of a plain base: those that `nybble.quantize` would take) are
            quantized after the sum. Weights that the adapter does not change keep their bytes where the format allows.
        onto: a directory with the original 16-bit weights to merge onto, instead of the dequantized ones of `base`.
        block_size: of the quantized result; by default the base's. search: see `QuantConfig`.
        absorb: for a 4-bit result from a quantized base, without `onto`: round so that the update's effect survives
            (`nybble.checkpoint.absorb`), where rounding to the nearest code loses nearly all of it. Slower; and where
            the original weights are at hand, `onto` loses less.
        max_shard_size, max_memory, workers, restart, progress: see `nybble.quantize`.

    Returns:
        A report with a row a merged weight.

    Raises:
        CheckpointNotFoundError, CheckpointError, DestinationExistsError, StorageFullError: as `nybble.quantize`.
        PatternError: the adapter names a layer that the base does not have.
        ValueError: `to` is not one of those, or an option does not go with it.
    """
    if to not in (*PLAIN, *QUANTIZED):
        raise ValueError(f"to is {to!r}; allowed are {', '.join((*PLAIN, *QUANTIZED))}")
    check_run_arguments(max_shard_size, max_memory, workers)
    destination = Path(dst)
    file = read_adapter(Path(adapter))
    for origin in (base, adapter, *(() if onto is None else (onto,))):
        check_outside(Path(origin), destination)
    plan = _Plan(
        open_source(base), None if onto is None else open_source(onto), file, to, block_size, search, absorb=absorb
    )
    report = MergeReport(Path(base), Path(adapter), destination, notes=plan.notes)
    files = plan.files(report)
    options = {"to": to, "block_size": block_size, "search": search, "absorb": absorb}
    options["max_shard_size"] = int(max_shard_size)
    return _run(plan, "merge", options, files, report, max_shard_size, max_memory, workers, restart, progress)


def unmerge(
    merged: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    max_shard_size: float = 5e9,
    max_memory: float | None = None,
    workers: int | None = None,
    restart: bool = False,
    progress: Progress | bool | None = None,
) -> MergeReport:
    """Take an adapter out of the 16- or 32-bit weights that it was merged into: W - scaling * B A.

    Right up to the rounding of the stored weights: what 16 bits had rounded away, merging and unmerging does not bring
    back. Weights that the adapter does not change keep their bytes.

    Args:
        merged: a directory of plain weights. adapter: LoRA without DoRA or modules_to_save, which cannot be taken back.
        dst, max_shard_size, max_memory, workers, restart, progress: see `nybble.quantize`.

    Raises:
        CheckpointError: the weights are quantized, or the adapter is of a kind that cannot be taken back. Else as
            `merge`.
    """
    check_run_arguments(max_shard_size, max_memory, workers)
    source, destination, file = open_source(merged), Path(dst), read_adapter(Path(adapter))
    for origin in (merged, adapter):
        check_outside(Path(origin), destination)
    if file.settings["use_dora"] or file.settings["modules_to_save"]:
        what = "DoRA" if file.settings["use_dora"] else "modules_to_save"
        raise CheckpointError(f"{file.directory}: {what} overwrites what was there and cannot be taken back")
    if bnb.group(source.tensors, str(source.root)).quantized:
        raise CheckpointError(f"{source.root}: its weights are quantized; an adapter can be taken out of plain ones")
    plan = _Plan(source, None, file, None, None, "absmax", factor=-1.0)
    report = MergeReport(Path(merged), Path(adapter), destination, notes=plan.notes)
    files = plan.files(report)
    options = {"max_shard_size": int(max_shard_size)}
    return _run(plan, "unmerge", options, files, report, max_shard_size, max_memory, workers, restart, progress)


def _run(
    plan: _Plan,
    kind: str,
    options: dict[str, Any],
    files: Mapping[str, bytes | Path],
    report: MergeReport,
    max_shard_size: float,
    max_memory: float | None,
    workers: int | None,
    restart: bool,
    progress: Progress | bool | None,
) -> MergeReport:
    adapter = sorted(plan.adapter.directory.glob("adapter_*"))
    identity = {
        "kind": kind,
        "version": __version__,
        "source": fingerprint(plan.base, files),
        "onto": None if plan.onto is None else fingerprint(plan.onto, {}),
        "adapter": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in adapter},
        "options": options,
        "plan": plan_digest(plan.tasks),
    }
    memory = None if max_memory is None else int(max_memory)
    job = Job(report.destination, identity, workers=workers, max_memory=memory, restart=restart)
    with job, progress_bar(progress, sum(task.nbytes for task in plan.tasks)) as tick:
        results = job.run(plan.tasks, max_shard_size=int(max_shard_size), metadata={"format": "pt"}, tick=tick)
        job.commit(files)
    report.rows = [MergeRow(**{**row, "shape": tuple(row["shape"])}) for row in results if row]
    report.bytes_after, report.resumed = job.nbytes, job.resumed
    return report


class _Plan:
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
        self._groups = bnb.group(base.tensors, str(base.root))
        self._used: dict[str, QuantConfig] = {}
        self._settings = self._choose(block_size, search)
        if absorb and to not in ABSORBING:
            raise ValueError(f"absorb is for a 4-bit result ({', '.join(ABSORBING)}); to is {to!r}")
        if absorb and (onto is not None or not self._groups.quantized):
            # Measured (SmolLM2, a LoRA of 60 steps): nearest codes 12.4, absorbed 21.3 onto the original weights; 17.4
            # and 14.8 onto the dequantized ones. Weights that lie off the grid carry an update through rounding.
            raise ValueError("absorb is for the dequantized weights of a quantized base; original ones do without")
        self._changes = self._match()
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
        if not self._groups.quantized:
            from .select import select

            selection = select(self.base, config)
            self.notes += selection.notes
            self._kept = selection.not_converted
            return selection.settings
        result = {}
        for members in self._groups.quantized.values():
            found = self._reader(members).config
            size = block_size or (found.block_size if found.is_4bit else 64)
            nested = found.double_quant if found.is_4bit else True
            result[members["weight"]] = replace(config, block_size=size, double_quant=nested)
        block = (self.base.config() or {}).get("quantization_config") or {}
        self._kept = block.get("llm_int8_skip_modules") or block.get("modules_to_not_convert") or []
        return result

    def _match(self) -> dict[str, AdapterLayer]:
        """Weight name -> what the adapter does to it."""
        weights = {m["weight"]: self._reader(m).shape for m in self._groups.quantized.values()}
        weights |= {name: self.base.tensors[name].shape for name in self._groups.plain if name.endswith("weight")}
        result = {}
        for path, layer in self.adapter.layers.items():
            name = _find(f"{path}.weight", weights)
            if name is None:
                raise PatternError(
                    f"{self.adapter.directory / WEIGHTS_NAME}: {path!r}: {self.base.root} has no weight for it"
                )
            if weights[name] != layer.shape:
                raise CheckpointError(
                    f"{layer.lora_A.path}: {path!r} is for a weight {list(layer.shape)}; {name!r} in {self.base.root} "
                    f"is {list(weights[name])}"
                )
            result[name] = layer
        return result

    def _match_saved(self) -> dict[str, TensorInfo]:
        """Name in the base -> the full tensor that the adapter has for it; new names for modules that were tied."""
        shapes = {name: info.shape for name, info in self.base.tensors.items()}
        shapes |= {m["weight"]: self._reader(m).shape for m in self._groups.quantized.values()}
        named = self.adapter.settings["modules_to_save"] or []
        result = {}
        for name, info in self.adapter.saved.items():
            found = _find(name, shapes)
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
            result[found or name] = info
        return result

    def _require_same(self, name: str, found: str | None, info: TensorInfo) -> None:
        own = self.base.tensors.get(found or "")
        if own is None and self._tied() and name.endswith("lm_head.weight"):
            own = next((t for n, t in self.base.tensors.items() if n.endswith("embed_tokens.weight")), None)
        same = own is not None and own.shape == info.shape and own.dtype in FLOAT_DTYPES
        if own is None or not same or _error(PlainReader(own), PlainReader(info)):
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} is not the base's, and modules_to_save does not name it"
            )

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def _make(self) -> list[Task]:
        tasks = []
        members_of = {members["weight"]: members for members in self._groups.quantized.values()}
        parts = {name for members in members_of.values() for name in members.values()}
        for name, info in self.base.tensors.items():
            if name in members_of:
                tasks += self._quantized_weight(name, members_of[name])
            elif name not in parts:
                tasks.append(self._plain_tensor(name, info))
        tasks += [self._saved_tensor(n, info) for n, info in self._saved.items() if n not in self.base.tensors]
        table = next((n for n, layer in self._changes.items() if layer.kind == "embedding"), None)
        if table is not None and self._tied() and not any(task.name.endswith("lm_head.weight") for task in tasks):
            # The head shared the table, and the adapter changes only the table.
            info = self.base.tensors[table]
            head = Slot("lm_head.weight", info.dtype, info.shape)
            tasks.append(Task(head.name, [head], info.nbytes, lambda out: copy(info, out, head.name)))
        return tasks

    def _tied(self) -> bool:
        settings = self.base.config() or {}
        return bool(settings.get("tie_word_embeddings", False))

    def _reader(self, members: Mapping[str, str]) -> QuantizedReader:
        return QuantizedReader({part: self.base.tensors[name] for part, name in members.items()})

    def _quantized_weight(self, name: str, members: Mapping[str, str]) -> list[Task]:
        nbytes = sum(self.base.tensors[member].nbytes for member in members.values())
        layer, setting = self._changes.get(name), self._settings.get(name)
        if name in self._saved:
            return [self._saved_tensor(name, self._saved[name])]
        if layer is None and self.onto is None and setting is not None and _same(self._reader(members).config, setting):
            self._used[name] = setting
            return [self._copy(self.base.tensors[member]) for member in members.values()]

        def reader() -> Reader:
            return self._reader(members) if self.onto is None else self._original(name)

        before = (lambda: self._reader(members)) if self.onto is not None else None
        return [self._weight(name, nbytes, reader, layer, setting, before)]

    def _original(self, name: str) -> Reader:
        assert self.onto is not None
        found = _find(name, self.onto.tensors)
        if found is None:
            raise CheckpointError(
                f"{self.onto.root}: there is no tensor {name!r}, which {self.base.root} has quantized"
            )
        reader = PlainReader(self.onto.tensors[found])
        want = self._reader(next(m for m in self._groups.quantized.values() if m["weight"] == name)).shape
        if reader.shape != want:
            raise CheckpointError(f"{reader.name} has shape {list(reader.shape)}, the quantized one {list(want)}")
        return reader

    def _plain_tensor(self, name: str, info: TensorInfo) -> Task:
        layer, setting = self._changes.get(name), self._settings.get(name)
        if name in self._saved:
            return self._saved_tensor(name, self._saved[name])
        if layer is None and setting is None:
            return self._copy(info)
        return self._weight(name, info.nbytes, lambda: PlainReader(info), layer, setting, None)

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
            return pump(PlainReader(info), PlainSink(name, dtype), out, info.nbytes)

        return Task(name, sink.slots(info.shape), info.nbytes, run, *least_memory(PlainReader(info), sink))

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
        settings.pop("quantization_config", None)
        if self._to is not None and self._to in PLAIN:
            for key in ("torch_dtype", "dtype"):
                if key in settings:
                    settings[key] = str(PLAIN[self._to]).removeprefix("torch.")
        elif self._used and self._to is not None:
            config = QuantConfig(self._to)
            dtype = str(settings.get("dtype") or settings.get("torch_dtype") or "bfloat16")
            settings["quantization_config"] = bnb.quantization_config(config, self._used.values(), dtype, self._kept)
        names = {task.name for task in self.tasks}
        if any(name.endswith("lm_head.weight") for name in names - self.base.tensors.keys()):
            settings["tie_word_embeddings"] = False
            self.notes.append("the head shared the embedding's weight and has its own now")
        files["config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
        return files


def _find(name: str, known: Mapping[str, Any]) -> str | None:
    """`name` as the file has it, where the base model's prefix may be missing on either side."""
    if name in known:
        return name
    inner = name.partition(".")[2]
    if inner in known:
        return inner
    ends = [other for other in known if other.endswith(f".{name}") and other.count(".") == name.count(".") + 1]
    return ends[0] if len(ends) == 1 else None


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
