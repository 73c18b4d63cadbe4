"""Merging an adapter into a checkpoint on disk: in pieces, resumable, into 16 bits or straight into a quantized format.

A merged weight is W + scaling * B A (DoRA: its rows scaled to the trained magnitudes), where W is what the adapter was
trained on: the dequantized weight of a quantized base, or the weight itself. Every other tensor is carried along.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import CheckpointError
from .adapter import read_adapter
from .files import check_outside, open_source
from .merge_plan import ABSORBING, PLAIN, QUANTIZED, MergePlan
from .merge_report import MergeReport, MergeRow
from .processes import Processes, check_processes, together
from .stream import Progress, check_run_arguments, fingerprint, idle_note, plan_digest, progress_bar
from .team import Team
from .together import job_of
from .weights import Weights

__all__ = ["ABSORBING", "PLAIN", "QUANTIZED", "merge", "unmerge"]


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
    processes: Processes = 1,
) -> MergeReport:
    """Merge a LoRA adapter (PEFT's layout) into a checkpoint directory, in bounded memory, resumable.

    Args:
        base: the directory that the adapter was trained on: quantized (bitsandbytes' layout), plain, or in fp8.
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
        max_shard_size, max_memory, workers, restart, progress, processes: see `nybble.quantize`.

    Returns:
        A report with a row a merged weight.

    Raises:
        CheckpointNotFoundError, CheckpointError, DestinationExistsError, StorageFullError, LostProcessError,
            ReportedError: as `nybble.quantize`.
        PatternError: the adapter names a layer that the base does not have.
        NonFiniteError: the adapter or a merged weight holds NaN or infinity; names the tensor and its file.
        ValueError: `to` is not one of those, or an option does not go with it.
    """
    if to not in (*PLAIN, *QUANTIZED):
        raise ValueError(f"to is {to!r}; allowed are {', '.join((*PLAIN, *QUANTIZED))}")
    check_run_arguments(max_shard_size, max_memory, workers)
    check_processes(processes)
    return together(
        _merge, processes, base=base, adapter=adapter, dst=dst, to=to, onto=onto, block_size=block_size, search=search,
        absorb=absorb, max_shard_size=max_shard_size, max_memory=max_memory, workers=workers, restart=restart,
        progress=progress,
    )  # fmt: skip


def _merge(
    team: Team | None,
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    onto: str | os.PathLike[str] | None,
    block_size: int | None,
    search: str,
    absorb: bool,
    **run: Any,
) -> MergeReport:
    """One process's part of `merge`; `run`: the arguments of `_run` by these names."""
    destination = Path(dst)
    file = read_adapter(Path(adapter))
    for origin in (base, adapter, *(() if onto is None else (onto,))):
        check_outside(Path(origin), destination)
    plan = MergePlan(
        open_source(base), None if onto is None else open_source(onto), file, to, block_size, search, absorb=absorb
    )
    report = MergeReport(Path(base), Path(adapter), destination, notes=plan.notes)
    files = plan.files(report)
    options = {"to": to, "block_size": block_size, "search": search, "absorb": absorb}
    return _run(team, plan, "merge", options, files, report, **run)


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
    processes: Processes = 1,
) -> MergeReport:
    """Take an adapter out of the 16- or 32-bit weights that it was merged into: W - scaling * B A.

    Right up to the rounding of the stored weights: what 16 bits had rounded away, merging and unmerging does not bring
    back. Weights that the adapter does not change keep their bytes.

    Args:
        merged: a directory of plain weights. adapter: LoRA without DoRA or modules_to_save, which cannot be taken back.
        dst, max_shard_size, max_memory, workers, restart, progress, processes: see `nybble.quantize`.

    Raises:
        CheckpointError: the weights are quantized, or the adapter is of a kind that cannot be taken back. Else as
            `merge`.
    """
    check_run_arguments(max_shard_size, max_memory, workers)
    check_processes(processes)
    return together(
        _unmerge, processes, merged=merged, adapter=adapter, dst=dst, max_shard_size=max_shard_size,
        max_memory=max_memory, workers=workers, restart=restart, progress=progress,
    )  # fmt: skip


def _unmerge(
    team: Team | None,
    merged: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    **run: Any,
) -> MergeReport:
    """One process's part of `unmerge`."""
    source, destination, file = open_source(merged), Path(dst), read_adapter(Path(adapter))
    for origin in (merged, adapter):
        check_outside(Path(origin), destination)
    if file.settings["use_dora"] or file.settings["modules_to_save"]:
        what = "DoRA" if file.settings["use_dora"] else "modules_to_save"
        raise CheckpointError(f"{file.directory}: {what} overwrites what was there and cannot be taken back")
    weights = Weights(source)
    if weights.packed or weights.fp8:
        raise CheckpointError(f"{source.root}: its weights are quantized; an adapter can be taken out of plain ones")
    plan = MergePlan(source, None, file, None, None, "absmax", factor=-1.0)
    report = MergeReport(Path(merged), Path(adapter), destination, notes=plan.notes)
    files = plan.files(report)
    return _run(team, plan, "unmerge", {}, files, report, **run)


def _run(
    team: Team | None,
    plan: MergePlan,
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
        "options": {**options, "max_shard_size": int(max_shard_size)},
        "plan": plan_digest(plan.tasks),
    }
    memory = None if max_memory is None else int(max_memory)
    job = job_of(team, report.destination, identity, workers=workers, max_memory=memory, restart=restart)
    with job, progress_bar(progress, sum(task.nbytes for task in plan.tasks)) as tick:
        results = job.run(plan.tasks, max_shard_size=int(max_shard_size), metadata={"format": "pt"}, tick=tick)
        job.commit(files)
    report.rows = [MergeRow(**{**row, "shape": tuple(row["shape"])}) for row in results if row]
    report.bytes_after, report.resumed = job.nbytes, job.resumed
    if team is not None and len(job.shards) < team.size:
        report.notes.append(idle_note(len(job.shards), team.size))
    return report
