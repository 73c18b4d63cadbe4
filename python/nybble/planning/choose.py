"""The table that people choose by: every method's memory for one model, what fits, and the command to run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.report import format_bytes
from . import machine
from .machine import Memory
from .memory import Estimate, estimate
from .shapes import Shape, find_shape
from .work import Work


@dataclass(frozen=True)
class Way:
    """A method over a base of weights, as the field speaks of them."""

    key: str
    label: str
    method: str
    base: str
    when: str


WAYS = (
    Way("prompting-nf4", "just prompting, 4-bit", "inference", "nf4", "the task can be told or shown in the prompt"),
    Way("prompting", "just prompting, bf16", "inference", "bf16", "the same, where 4 bits lose too much"),
    Way("prompt", "prompt tuning, 4-bit", "prompt", "nf4", "one narrow task; kilobytes a task; learns least"),
    Way("prefix", "prefix tuning, 4-bit", "prefix", "nf4", "as prompt tuning, more capacity; files of megabytes"),
    Way("bottleneck", "bottleneck, 4-bit", "bottleneck", "nf4", "many tasks over one base; is not merged into it"),
    Way("qlora", "QLoRA (NF4)", "lora", "nf4", "the usual choice where bf16 weights do not fit"),
    Way("lora", "LoRA (bf16)", "lora", "bf16", "the usual choice; merges into the weights"),
    Way("dora", "DoRA (bf16)", "dora", "bf16", "where LoRA at low rank falls short; slower"),
    Way("full", "full (fp32)", "full", "fp32", "much data, a new language or domain"),
)
#: Part of a command where memory is scarce: what is freed is then given back at once. glibc's heap cannot use the hole
#: of an aligned block for the next one of that size, and grows.
LOW_MEMORY = "--low-memory"
#: Of the free memory, from where on that is done: the heap held up to 2.6 times what is counted above the imports.
_SCARCE = 0.35
#: What is recommended, of the ways that fit: the first of these.
_PREFERRED = ("lora", "qlora", "bottleneck", "prefix", "prompt", "prompting", "prompting-nf4")


@dataclass(frozen=True)
class Row:
    """One way.

    Attributes:
        way: which. plain: its memory; checkpointed: with gradient checkpointing, None where nothing is trained.
        fits: "yes", "with checkpointing" or "no". commands: what to run, where it fits.
    """

    way: Way
    plain: Estimate
    checkpointed: Estimate | None
    fits: str
    commands: tuple[str, ...]

    @property
    def estimate(self) -> Estimate:
        """That of the plain way if it fits, else the least."""
        return self.plain if self.fits == "yes" or self.checkpointed is None else self.checkpointed


@dataclass(frozen=True)
class Plan:
    """What fits where.

    Attributes:
        shape: of the model. work: the sizes of a step. memory: how much there is.
        rows: those that fit first, the lightest at the top. notes: what to know. advice: what would fit, where no
            training does.
    """

    shape: Shape
    work: Work
    memory: Memory
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    advice: tuple[str, ...] = field(default=())

    def row(self, key: str) -> Row:
        """The row of a way by its key or label, or by its method where only one row has it.

        Raises ValueError with the keys.
        """
        wanted = key.lower()
        for names in (lambda r: (r.way.key, r.way.label.lower()), lambda r: (r.way.method,)):
            found = [row for row in self.rows if wanted in names(row)]
            if found:
                return found[0]
        raise ValueError(f"why: no method {key!r} here; there are {', '.join(row.way.key for row in self.rows)}")

    @property
    def recommended(self) -> Row | None:
        """The strongest of the usual ways that fit, or None."""
        fitting = {row.way.key: row for row in self.rows if row.fits != "no"}
        return next((fitting[key] for key in _PREFERRED if key in fitting), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; memory in bytes."""
        return {
            "model": self.shape.name,
            "source": self.shape.source,
            "parameters": self.shape.parameters,
            "memory": {"bytes": self.memory.bytes, "system": self.memory.system, "found": self.memory.found},
            "work": {name: getattr(self.work, name) for name in self.work.__dataclass_fields__},
            "methods": [_row_dict(row) for row in self.rows],
            "recommended": None if self.recommended is None else self.recommended.way.key,
            "notes": list(self.notes),
            "advice": list(self.advice),
        }


def _row_dict(row: Row) -> dict[str, Any]:
    def told(found: Estimate | None) -> dict[str, Any] | None:
        if found is None:
            return None
        parts: dict[str, int] = {}
        for line in found.lines:
            parts[line.part] = parts.get(line.part, 0) + line.bytes
        return {"bytes": found.total, "phase": found.phase, "parts": parts, "phases": found.phases}

    return {
        "key": row.way.key,
        "method": row.way.method,
        "base": row.way.base,
        "trained": row.plain.trained,
        "share": row.plain.share,
        "memory": told(row.plain),
        "with_checkpointing": told(row.checkpointed),
        "fits": row.fits,
        "when": row.way.when,
        "commands": list(row.commands),
    }


def plan(
    model: str | os.PathLike[str] | Shape,
    memory: float | Memory | None = None,
    work: Work | None = None,
    **options: Any,
) -> Plan:
    """The memory of every method of using and training a model, from its config.json alone.

    Args:
        model: a directory with a config.json, such a file, the name of a built-in shape, or a `Shape`.
        memory: bytes of the machine or GPU; by default this machine's, or its container's limit.
        work: the sizes of a step; or give its fields as keywords (batch, seq, rank, optimizer, device, ...). Without
            seq it is 2,048, or the model's longest text if that is less.

    Raises:
        ValueError: an unknown name, or a field that is not allowed. CheckpointError: config.json is damaged.

    >>> found = plan("Llama-3.1-8B", 24e9, seq=2048, batch=1)
    >>> [row.way.key for row in found.rows if row.fits == "no"]
    ['full']
    >>> round(found.row("qlora").plain.part("weights") / 1e9, 2)
    5.59
    """
    if work is not None and options:
        raise TypeError(f"give either work or its fields, not both: got {', '.join(options)} too")
    shape = model if isinstance(model, Shape) else find_shape(model)
    if work is None:
        work = Work(**{"seq": min(Work.seq, shape.context or Work.seq), **options})
    if memory is None:
        memory = machine.here(work.device)
    elif not isinstance(memory, Memory):
        if not memory > 0:
            raise ValueError(f"memory must be a number of bytes above 0, got {memory!r}")
        memory = machine.given(memory, work.device)
    path = None if isinstance(model, Shape) or not Path(model).exists() else _directory(Path(model))
    rows = [_row(way, shape, work, memory, path) for way in _ways(shape)]
    rows.sort(key=lambda row: (row.fits == "no", row.estimate.total))
    trains = any(row.fits != "no" and row.checkpointed is not None for row in rows)
    advice = () if trains else tuple(_advice(shape, work, memory))
    return Plan(shape, work, memory, tuple(rows), tuple(_notes(shape, work)), advice)


def _directory(path: Path) -> Path:
    return path.parent if path.is_file() and path.name == "config.json" else path


def _ways(shape: Shape) -> Iterator[Way]:
    """Those that the model can have."""
    for way in WAYS:
        if shape.quantized and way.base != "nf4":
            continue  # the original weights are not there
        if not shape.packed and way.base == "nf4":
            continue
        if way.method in ("lora", "dora") and not any(m.plain for m in shape.matrices):
            continue
        yield way


def _row(way: Way, shape: Shape, work: Work, memory: Memory, path: Path | None) -> Row:
    plain = estimate(shape, way.method, way.base, work)
    checkpointed = None if way.method == "inference" else estimate(shape, way.method, way.base, work, True)
    fits = "no"
    if plain.total <= memory.free:
        fits = "yes"
    elif checkpointed is not None and checkpointed.total <= memory.free:
        fits = "with checkpointing"
    commands: tuple[str, ...] = ()
    if fits != "no":
        commands = tuple(_commands(way, shape, work, fits == "with checkpointing", path))
        total = plain.total if fits == "yes" or checkpointed is None else checkpointed.total
        if checkpointed is not None and work.device == "cpu" and shape.causal and total > _SCARCE * memory.free:
            commands = (*commands[:-1], f"{commands[-1]} {LOW_MEMORY}")
    return Row(way, plain, checkpointed, fits, commands)


def _commands(way: Way, shape: Shape, work: Work, checkpointing: bool, path: Path | None) -> Iterator[str]:
    if shape.head and not shape.causal:
        return
    source = str(path) if path is not None else f"path/to/{shape.name}"
    if way.base == "nf4" and not shape.quantized:
        packed = f"{source.rstrip('/')}-nf4"
        yield shlex.join(["nybble", "quantize", source, packed])
        source = packed
    device = {"cpu": [], "cuda": ["--device", "cuda"], "unified": ["--device", "mps"]}[work.device]
    if way.method == "inference":
        if shape.causal:
            yield shlex.join(["nybble", "generate", source, "PROMPT", *device])
        return
    if not shape.head:
        yield f"# in Python: nybble.training.TextClassifier over nybble.load({source!r}); see README, Training"
        return
    options: dict[str, list[Any]] = {
        "lora": ["--rank", work.rank],
        "dora": ["--method", "dora", "--rank", work.rank],
        "bottleneck": ["--method", "bottleneck", "--size", work.size],
        "prefix": ["--method", "prefix", "--tokens", work.tokens],
        "prompt": ["--method", "prompt", "--tokens", work.tokens],
        "full": ["--method", "full"],
    }
    words: list[Any] = ["nybble", "finetune", source, "TEXT", "RUN_DIR", *options[way.method]]
    words += ["--batch-size", work.batch, "--seq-len", work.seq]
    if work.optimizer != "adamw":
        words += ["--optimizer", work.optimizer]
    if checkpointing:
        words.append("--gradient-checkpointing")
    yield shlex.join(map(str, [*words, *device]))


def _notes(shape: Shape, work: Work) -> Iterator[str]:
    if shape.quantized:
        yield "config.json says that the weights are quantized: methods over plain weights need the original"
    if not shape.packed:
        yield "its linear layers are none that nybble quantizes: methods over 4-bit weights are left out"
    if shape.experts:
        yield (
            f"a mixture of {shape.experts} experts: LoRA and DoRA stand beside the attention's layers only, experts "
            "are frozen"
        )
        if work.device == "cpu":
            yield (
                "transformers copies plain experts together while loading: as much of the file's pages as they take is "
                "resident beside what is counted, until memory is short"
            )
    if shape.stored == "float32" and not shape.quantized:
        yield (
            "config.json says float32, and `nybble finetune` keeps what it does not quantize as it is: the rows here "
            "are those of a bf16 copy"
        )
    if shape.head and not shape.causal:
        yield (
            "its head is not one that writes text from left to right (an encoder-decoder, or a masked language model): "
            "`nybble finetune` and `generate` do not take it, so there is no command; it is counted by the same rules, "
            "without attention between stacks, and was not measured"
        )
    if not shape.head:
        yield "it has no head over a vocabulary: what a classifier's head takes is left out, and was not measured"
    if not shape.gated:
        yield "its feed-forward is not gated: what its layers keep is counted by the same rules, but was not measured"
    if work.device == "cpu":
        yield "weights are counted as resident; pages of a mapped checkpoint can be given back when memory is short"
        yield (
            f"counted is what training holds with {LOW_MEMORY}. Without it glibc's heap keeps holes beside, 1.1 to 2.6 "
            "times as much in all, most of it with small models and checkpointing; giving them back makes a step take "
            "1.1 to 1.5 times its CPU time at hidden size 1,024"
        )
    if work.device != "cpu":
        unit = {"cuda": "a GPU", "unified": "unified memory"}[work.device]
        yield f"nothing of this has been measured on {unit}; the runtime's shares are assumptions"
        yield (
            "counted is what nybble's kernels take; where an installation has none (nybble doctor tells), torch's "
            "operations decode 4-bit weights, with 17 bytes for each of the largest one's"
        )
    if shape.context is not None and work.seq > shape.context:
        yield f"seq is {work.seq:,}, which is more than the model's longest text: {shape.context:,} tokens"


def _advice(shape: Shape, work: Work, memory: Memory) -> Iterator[str]:
    """Where no training fits: what would, or how much is missing."""
    ways = {way.key: way for way in _ways(shape)}
    way = next(ways[key] for key in ("qlora", "lora", "full", "prompt") if key in ways)

    def needs(changed: Work, checkpointing: bool = True) -> int:
        return estimate(shape, way.method, way.base, changed, checkpointing).total

    now = needs(work)
    missing = now - memory.free
    yield f"{way.label} with checkpointing needs {format_bytes(now)}: {format_bytes(missing)} more than there is for it"
    changed = work
    for name, value in _smaller(work):
        trial = replace(changed, **{name: value})
        saved = needs(changed) - needs(trial)
        if saved <= 0:
            continue
        changed = trial
        fits = needs(changed) <= memory.free
        yield f"{name} {value}: {format_bytes(needs(changed))}" + (", which fits" if fits else "")
        if fits:
            return
    least = needs(changed)
    yield (
        f"the least of these is {format_bytes(least)}; a machine of "
        f"{format_bytes(_machine_for(least, work.device))} holds it, or several (--ranks)"
    )


def _smaller(work: Work) -> Iterator[tuple[str, Any]]:
    """Changes of the step, those that cost least first."""
    if work.optimizer == "adamw":
        yield "optimizer", "adamw8bit"
    batch = work.batch
    while batch > 1:
        batch //= 2
        yield "batch", batch
    seq = work.seq
    while seq > 256:
        seq = max(256, seq // 2)
        yield "seq", seq
    if work.rank > 8:
        yield "rank", 8


def _machine_for(needed: float, device: str) -> float:
    """The least memory of which so much is free."""
    size = needed
    while machine.given(size, device).free < needed:
        size *= 1.01
    return size
