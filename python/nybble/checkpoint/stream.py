"""Quantizing a checkpoint on disk into another, in pieces, so that memory bounds no model."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..formats import QuantConfig
from . import bnb
from .files import OTHER_WEIGHT_SUFFIXES, Source, TensorInfo, check_outside, open_source
from .processes import Processes, check_processes, together
from .report import CheckpointReport, TensorReport
from .select import Selection, select
from .slabs import PlainReader, PlainSink, QuantSink, Reader, ScaledReader, copy, least_memory, pump
from .task import Output, Task, Tick
from .team import Team
from .together import job_of
from .writer import Slot

if TYPE_CHECKING:
    from ..calibration import Calibration
    from ..calibration.config import Text
    from .calibrated import Calibrated

Progress = Callable[[int, int, str], None]

# Beside a single file, which may lie in a folder of unrelated things, only files of these names belong to it.
_COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "spiece.model",
)  # fmt: skip
_WEIGHT_SUFFIXES = (".safetensors", ".index.json", *OTHER_WEIGHT_SUFFIXES)
_OTHER_FORMAT_FOLDERS = {"original", "onnx", "openvino", "coreml", "metal", "gguf"}
_SUBFOLDER_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".py", ".md")


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    config: QuantConfig | None = None,
    *,
    max_shard_size: float = 5e9,
    max_memory: float | None = None,
    workers: int | None = None,
    restart: bool = False,
    progress: Progress | bool | None = None,
    calibration: Calibration | Text | None = None,
    processes: Processes = 1,
) -> CheckpointReport:
    """Quantize the linear weights of a safetensors checkpoint into a new directory in bitsandbytes' layout.

    Weights are read, quantized and written in pieces, by several threads; fp8 weights are decoded by their scales.
    Everything else in the checkpoint (other tensors, config, tokenizer) is carried along; weights in other formats are
    not. The files get their names only when all are complete. An interrupted run (killed, out of disk space) is
    continued by the same call, with the same bytes as a result; neither threads, processes nor memory change them.

    Args:
        src: a `.safetensors` file, or a Hugging Face directory, sharded or not.
        dst: a directory that is new or empty, or holds an unfinished run of the same call.
        config: `QuantConfig()` (NF4, blocks of 64, double quantization, the head skipped) if None.
        max_shard_size: bytes; a larger checkpoint is written as several files with an index.
        max_memory: bytes that the process may take beyond what it and its libraries had before the first weight; by
            default what runs at full speed, about 16 MB a worker and more for the scales of very large weights.
        workers: threads; by default as many as torch uses.
        restart: discard an unfinished run in `dst`, whosever it is.
        progress: True for a progress bar on stderr, or a function called with (bytes done, bytes in all, tensor name),
            from any of the threads, one call at a time.
        calibration: text by which the weights of the model's blocks are rounded, so that the layers' outputs change
            least (a `Calibration`, or just its data): a better model in the same files, for some minutes more. It runs
            the model a block at a time, in fp32, on all of torch's threads (`workers` is not looked at), and takes
            memory for one block, the moments of its inputs and the activations. Weights outside of the blocks, and
            experts in three dimensions, are rounded by `config.search`.
        processes: how many do the work, spread over them by output file, so that it takes several of those to be
            shared (see `max_shard_size`). A number: this one and others, started for the work on this machine; they
            share `max_memory`, to which the libraries of each come, and by default the threads. (The calling program
            must then be a module that can be imported without doing it all again, as for `multiprocessing`.)
            "torchrun": this call is made by every process of a run of torchrun, on one machine or on several that see
            the same files; `max_memory` is for those of a machine. The first process reports progress and errors.
            Not with `calibration`, which goes from block to block.

    Returns:
        A report; `report.table()` is a rich table of its figures.

    Raises:
        CheckpointNotFoundError: the source, a shard, or any safetensors in a directory is missing.
        CheckpointError: a file is damaged, or quantized already; the destination lies in the source, or another run is
            writing there; a weight needs more than `max_memory`.
        DestinationExistsError: the destination is a file, not empty, or holds an unfinished run of other work.
        CalibrationError: the model is not one stack of blocks that runs from token ids, or the text is too short.
        ValueError: token ids outside the model's vocabulary, windows longer than its context.
        PatternError: a pattern of `config.skip`, `include` or `overrides` matches no linear layer.
        NonFiniteError: a weight holds NaN or infinity; names the tensor and its file.
        StorageFullError: the disk is full; what is done is kept for the same call to go on.
        LostProcessError: one of several processes has ended; what is done is kept alike.
        ReportedError: in every process but the first, where that one raises an error, which is the cause of this.
    """
    config = QuantConfig() if config is None else config
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config: a QuantConfig is needed, not {type(config).__name__}")
    check_run_arguments(max_shard_size, max_memory, workers)
    check_processes(processes)
    if calibration is not None and processes != 1:
        raise ValueError(
            f"processes: with a calibration one process does the work, not {processes!r}: a block is rounded by what "
            f"the blocks before it put out"
        )
    return together(
        _quantize, processes, src=src, dst=dst, config=config, max_shard_size=max_shard_size, max_memory=max_memory,
        workers=workers, restart=restart, progress=progress, calibration=calibration,
    )  # fmt: skip


def _quantize(
    team: Team | None,
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    config: QuantConfig,
    max_shard_size: float,
    max_memory: float | None,
    workers: int | None,
    restart: bool,
    progress: Progress | bool | None,
    calibration: Calibration | Text | None,
) -> CheckpointReport:
    """One process's part of `quantize`."""
    source, destination = open_source(src), Path(dst)
    check_outside(Path(src), destination)
    selection = select(source, config)
    report = CheckpointReport(Path(src), destination, notes=selection.notes)
    report.parameters = sum(info.numel for name, info in source.tensors.items() if name not in selection.dropped)
    report.bytes_before = source.nbytes
    calibrator = None
    if calibration is not None:
        from .calibrated import Calibrated

        calibrator = Calibrated(source, selection, calibration)
        report.notes.extend(calibrator.notes)
    tasks = _tasks(source, selection, calibrator)
    files = {**carried_files(source, report), **_quantized_config(source, selection, config)}
    identity = {
        "kind": "quantize",
        "version": __version__,
        "source": fingerprint(source, files),
        "options": {**_stored_options(config), "max_shard_size": int(max_shard_size)},
        "plan": plan_digest(tasks),
        **({} if calibrator is None else {"calibration": calibrator.identity}),
    }
    job = job_of(
        team,
        destination,
        identity,
        workers=workers if calibrator is None else 1,
        max_memory=None if max_memory is None else int(max_memory),
        restart=restart,
    )
    if calibrator is not None:
        calibrator.kept = job.kept
    with job, progress_bar(progress, sum(task.nbytes for task in tasks)) as tick:
        metadata = {**{str(k): str(v) for k, v in source.metadata.items()}, "format": "pt"}
        results = job.run(tasks, max_shard_size=int(max_shard_size), metadata=metadata, tick=tick)
        job.commit(files)
    if calibrator is not None:
        report.notes.extend(calibrator.unreached(results))
    report.tensors = [TensorReport.from_dict(result) for result in results if result]
    report.shards, report.bytes_after, report.resumed = job.shards, job.nbytes, job.resumed
    if team is not None and len(job.shards) < team.size:
        report.notes.append(idle_note(len(job.shards), team.size))
    return report


def idle_note(files: int, processes: int) -> str:
    """For a report where processes had nothing to do."""
    return (
        f"{files} output file{'s' if files > 1 else ''} for {processes} processes: {processes - files} had nothing to "
        f"do; a smaller max_shard_size makes more files"
    )


def check_run_arguments(max_shard_size: float, max_memory: float | None, workers: int | None) -> None:
    """Raises ValueError, naming the argument, unless a run can be made with these."""
    if not max_shard_size > 0:
        raise ValueError(f"max_shard_size: a positive number of bytes is needed, not {max_shard_size}")
    if max_memory is not None and not max_memory > 0:
        raise ValueError(f"max_memory: a positive number of bytes is needed, not {max_memory}")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers: a number of threads, 1 or more, is needed, not {workers!r}")


def _stored_options(config: QuantConfig) -> dict[str, Any]:
    return bnb.stored(config).to_dict()


@contextmanager
def progress_bar(progress: Progress | bool | None, total: int) -> Iterator[Tick]:
    done = 0
    if progress is None or progress is False:
        yield lambda count, name: None
    elif progress is not True:
        call = progress

        def tick(count: int, name: str) -> None:
            nonlocal done
            done += count
            call(done, total, name)

        yield tick
    else:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda count, name: bar.update(task, advance=count, description=name)


def _tasks(source: Source, selection: Selection, calibrator: Calibrated | None = None) -> list[Task]:
    """One task for every tensor of the source that is carried along: in file order, calibrated ones behind."""
    calibrated = {} if calibrator is None else calibrator.tasks()
    others = [name for name in source.tensors if name not in selection.dropped and name not in calibrated]
    return [*(_task(source.tensors[name], selection) for name in others), *calibrated.values()]


def _task(info: TensorInfo, selection: Selection) -> Task:
    setting = selection.settings.get(info.name)
    if setting is None and info.name not in selection.scales:
        return Task(info.name, [Slot(info.name, info.dtype, info.shape)], info.nbytes, lambda out: copy(info, out))

    def reader() -> Reader:
        if info.name in selection.scales:
            return ScaledReader(info, selection.scales[info.name], selection.tile)
        return PlainReader(info)

    first = reader()
    if setting is None:
        plain = PlainSink(info.name, first.dtype)
        slots, least = plain.slots(info.shape), least_memory(first, plain)
    else:
        quant = QuantSink(info.name, info.shape, first.dtype, setting, first.name)
        slots, least = quant.slots(), least_memory(first, quant)

    def run(out: Output) -> dict[str, Any]:
        source = reader()
        if setting is None:
            return pump(source, PlainSink(info.name, source.dtype), out, info.nbytes)
        return pump(source, QuantSink(info.name, info.shape, source.dtype, setting, source.name), out, info.nbytes)

    return Task(info.name, slots, info.nbytes, run, *least)


def _companions(source: Source) -> Iterator[Path]:
    """Files to carry along, relative to the source's directory."""
    if not source.is_directory:
        yield from (Path(name) for name in _COMPANIONS if (source.root / name).is_file())
        return
    for path in sorted(source.root.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield Path(path.name)
        elif path.is_dir() and path.name not in _OTHER_FORMAT_FOLDERS:
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(_SUBFOLDER_SUFFIXES))
            yield from (p.relative_to(source.root) for p in inside)


def carried_files(source: Source, report: CheckpointReport) -> dict[str, bytes | Path]:
    """What goes along with the tensors, by name in the destination; config.json is not among them."""
    result: dict[str, bytes | Path] = {}
    left = []
    for relative in _companions(source):
        path = source.root / relative
        if relative == Path("config.json"):
            continue
        if path.name.lower().endswith(_WEIGHT_SUFFIXES):
            if path not in source.shards and not path.name.endswith(".index.json"):
                left.append(str(relative))
            continue
        result[relative.as_posix()] = path
    if left:
        report.notes.append(f"weights in other files were not carried along: {', '.join(left[:4])}")
    return result


def _quantized_config(source: Source, selection: Selection, config: QuantConfig) -> dict[str, bytes | Path]:
    settings: dict[str, Any] | None = source.config()
    if settings is None:
        return {}
    dtypes = Counter(bnb.JSON_DTYPES.get(source.tensors[name].dtype, "bfloat16") for name in selection.settings)
    used = [selection.settings[name] for name in selection.settings]
    experts = selection.fused_experts or any(len(source.tensors[name].shape) != 2 for name in selection.settings)
    block = bnb.quantization_config(config, used, dtypes.most_common(1)[0][0], selection.not_converted, experts)
    settings["quantization_config"] = block
    return {"config.json": (json.dumps(settings, indent=2) + "\n").encode()}


def fingerprint(source: Source, files: Mapping[str, bytes | Path]) -> dict[str, Any]:
    """What tells a checkpoint from another, or from itself after a change, without reading its data."""
    shards = {}
    for path in source.shards:
        state = path.stat()
        with path.open("rb") as file:
            header = file.read(8)
            header += file.read(int.from_bytes(header, "little"))
        shards[path.relative_to(source.root).as_posix()] = [
            state.st_size,
            state.st_mtime_ns,
            hashlib.sha256(header).hexdigest(),
        ]
    others: dict[str, Any] = {}
    for name, content in files.items():
        if isinstance(content, Path):
            state = content.stat()
            others[name] = [state.st_size, state.st_mtime_ns]
        else:
            others[name] = hashlib.sha256(content).hexdigest()
    return {"shards": shards, "files": others}


def plan_digest(tasks: Sequence[Task]) -> str:
    """What the tasks write, in short: it changes with whatever decides which tensor becomes what."""
    lines = [f"{task.name} {[(s.name, s.dtype, s.shape) for s in task.slots]}" for task in tasks]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
