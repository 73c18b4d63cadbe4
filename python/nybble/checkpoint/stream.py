"""Quantizing a checkpoint on disk into another, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..formats import QuantConfig
from ..tensor import QuantTensor
from . import bnb
from .files import (
    DTYPE_NAMES,
    INDEX_NAME,
    OTHER_WEIGHT_SUFFIXES,
    SINGLE_NAME,
    Source,
    TensorInfo,
    check_destination,
    open_source,
    read_bytes,
    read_tensor,
)
from .report import CheckpointReport, TensorReport
from .select import Selection, select
from .writer import ShardWriter, Slot, Staging, tensor_bytes

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
    progress: Progress | bool | None = None,
) -> CheckpointReport:
    """Quantize the linear weights of a safetensors checkpoint into a new directory in bitsandbytes' layout.

    Tensors are read, quantized and written one after another, so that memory holds about one of them. Everything else
    in the checkpoint (other tensors, config, tokenizer) is carried along; weights in other formats are not. The files
    get their names only when all are complete.

    Args:
        src: a `.safetensors` file, or a Hugging Face directory, sharded or not.
        dst: a directory that is new or empty.
        config: `QuantConfig()` (NF4, blocks of 64, double quantization, the head skipped) if None.
        max_shard_size: bytes; a larger checkpoint is written as several files with an index.
        progress: True for a progress bar on stderr, or a function called with (bytes done, bytes in all, tensor name).

    Returns:
        A report; `report.table()` is a rich table of its figures.

    Raises:
        CheckpointNotFoundError: the source, a shard, or any safetensors in a directory is missing.
        CheckpointError: a file is damaged, or quantized already; the destination lies in the source.
        DestinationExistsError: the destination is a file, or not empty.
        PatternError: a pattern of `config.skip` or `config.overrides` matches no linear layer.
        NonFiniteError: a weight holds NaN or infinity; names the tensor and its file.
        StorageFullError: the disk is full; no file is left.
    """
    config = QuantConfig() if config is None else config
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config: a QuantConfig is needed, not {type(config).__name__}")
    if not max_shard_size > 0:
        raise ValueError(f"max_shard_size: a positive number of bytes is needed, not {max_shard_size}")
    source, destination = open_source(src), Path(dst)
    check_destination(Path(src), destination)
    selection = select(source, config)
    report = CheckpointReport(Path(src), destination, notes=selection.notes)
    report.parameters = sum(info.numel for info in source.tensors.values())
    report.bytes_before = source.nbytes
    with Staging(destination) as staging, _progress(progress, source.nbytes) as tick:
        _write_shards(source, selection, staging, int(max_shard_size), report, tick)
        _carry_files(source, staging, report)
        _write_config(source, selection, config, staging)
        staging.commit()
    return report


@contextmanager
def _progress(progress: Progress | bool | None, total: int) -> Iterator[Progress]:
    if progress is None or progress is False:
        yield lambda done, total, name: None
    elif progress is not True:
        yield progress
    else:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done, total, name: bar.update(task, completed=done, description=name)


def _plan(source: Source, selection: Selection, limit: int) -> list[list[tuple[TensorInfo, list[Slot]]]]:
    """Tensors in source order, split into shards of at most `limit` bytes (a larger tensor gets one to itself)."""
    shards: list[list[tuple[TensorInfo, list[Slot]]]] = [[]]
    room = limit
    seen: set[str] = set()
    for name, info in source.tensors.items():
        setting = selection.settings.get(name)
        if setting is None:
            slots = [Slot(name, info.dtype, info.shape)]
        else:
            slots = bnb.slots(bnb.module_of(name), info.shape, setting)
        clash = seen.intersection(slot.name for slot in slots)
        if clash:
            raise CheckpointError(f"{info.path}: tensor {name!r}: the name {clash.pop()!r} would occur twice")
        seen.update(slot.name for slot in slots)
        size = sum(slot.nbytes for slot in slots)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append((info, slots))
        room -= size
    return shards


def _write_shards(
    source: Source, selection: Selection, staging: Staging, limit: int, report: CheckpointReport, tick: Progress
) -> None:
    shards = _plan(source, selection, limit)
    weight_map: dict[str, str] = {}
    metadata = {**{str(k): str(v) for k, v in source.metadata.items()}, "format": "pt"}
    done = 0
    for number, members in enumerate(shards, 1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        slots = [slot for _, group in members for slot in group]
        writer = ShardWriter(staging, name, slots, metadata)
        for info, _ in members:
            setting = selection.settings.get(info.name)
            if setting is None:
                report.bytes_after += writer.write(info.name, info.dtype, info.shape, read_bytes(info))
            else:
                row, size = _quantize_one(info, setting, writer)
                report.tensors.append(row)
                report.bytes_after += size
            done += info.nbytes
            tick(done, source.nbytes, info.name)
        writer.finish()
        report.shards.append(name)
        weight_map.update({slot.name: name for slot in slots})
    if len(shards) > 1:
        index = {"metadata": {"total_size": report.bytes_after}, "weight_map": dict(sorted(weight_map.items()))}
        staging.write(INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())


def _quantize_one(info: TensorInfo, setting: QuantConfig, writer: ShardWriter) -> tuple[TensorReport, int]:
    weight = read_tensor(info)
    quantized = QuantTensor.quantize(weight, setting, name=f"{info.name} ({info.path})")
    error = relative_error(weight, quantized)
    del weight
    prefix = bnb.prefix_of(bnb.module_of(info.name))
    total = payload = 0
    for key, value in quantized.state().items():
        size = writer.write(prefix + key, DTYPE_NAMES[value.dtype], tuple(value.shape), [tensor_bytes(value)])
        total += size
        payload += size if key in {"weight", "weight.absmax", "weight.nested_absmax", "SCB"} else 0
    bits = 8 * payload / info.numel
    return TensorReport(info.name, info.shape, setting.format_name, setting.block_size, bits, error), total


def relative_error(weight: torch.Tensor, quantized: QuantTensor, chunk: int = 1 << 14) -> float:
    """||W - Wq|| / ||W|| in the Frobenius norm, 0 for an all-zero weight.

    Pieces are summed in fp32, their sums in double precision. A piece stays in cache, and below the size from which
    torch starts threads, which on a busy machine wait for each other longer than they work.
    """
    exact, decoded = weight.reshape(-1), quantized.dequantize().reshape(-1)
    difference, norm = _squares(exact, decoded, torch.float32, chunk)
    if not 0.0 < norm < float("inf"):  # all zero, or values whose squares leave the range of fp32
        difference, norm = _squares(exact, decoded, torch.float64, chunk)
    return float((difference / norm) ** 0.5) if norm else 0.0


def _squares(exact: torch.Tensor, decoded: torch.Tensor, dtype: torch.dtype, chunk: int) -> tuple[float, float]:
    """||exact - decoded||^2 and ||exact||^2."""
    x, y = torch.empty(chunk, dtype=dtype), torch.empty(chunk, dtype=dtype)
    difference = norm = 0.0
    for start in range(0, exact.numel(), chunk):
        count = min(chunk, exact.numel() - start)
        a, b = x[:count].copy_(exact[start : start + count]), y[:count].copy_(decoded[start : start + count])
        norm += float(torch.linalg.vector_norm(a)) ** 2
        b.sub_(a)
        difference += float(torch.linalg.vector_norm(b)) ** 2
    return difference, norm


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


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece


def _carry_files(source: Source, staging: Staging, report: CheckpointReport) -> None:
    left = []
    for relative in _companions(source):
        path = source.root / relative
        if relative == Path("config.json"):
            continue
        if path.name.lower().endswith(_WEIGHT_SUFFIXES):
            if path not in source.shards and not path.name.endswith(".index.json"):
                left.append(str(relative))
            continue
        staging.write(relative.as_posix(), _pieces(path))
    if left:
        report.notes.append(f"weights in other files were not carried along: {', '.join(left[:4])}")


def _write_config(source: Source, selection: Selection, config: QuantConfig, staging: Staging) -> None:
    settings: dict[str, Any] | None = source.config()
    if settings is None:
        return
    dtypes = Counter(source.tensors[name].dtype for name in selection.settings)
    compute_dtype = bnb.JSON_DTYPES[dtypes.most_common(1)[0][0]]
    settings["quantization_config"] = bnb.quantization_config(
        config, selection.settings.values(), compute_dtype, selection.not_converted
    )
    staging.write("config.json", (json.dumps(settings, indent=2) + "\n").encode())
