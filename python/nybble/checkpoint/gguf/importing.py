"""A GGUF file into a Hugging Face directory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import CheckpointError
from ..files import INDEX_NAME, SINGLE_NAME, check_destination
from ..writer import ShardWriter, Slot, Staging, tensor_bytes
from . import architecture, rope
from .architecture import ROPE_FACTORS, Model, Planned
from .reader import GGUFFile, GGUFTensor, can_dequantize, read_gguf
from .report import GGUFReport, Progress
from .tokenizer_json import json_bytes, tokenizer_files
from .vocabulary import Vocabulary, from_fields

_DTYPES = {
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
    "float32": ("F32", torch.float32),
}
_SLAB_ELEMENTS = 1 << 21  # decoded at a time: 8 MiB of fp32, and a few times that in temporaries


def import_(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    dtype: str,
    pre: str | None,
    max_shard_size: float,
    progress: Progress | None,
) -> GGUFReport:
    """`nybble.import_gguf`."""
    if dtype != "auto" and dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are auto, {', '.join(_DTYPES)}")
    if not max_shard_size > 0:
        raise ValueError(f"max_shard_size: a positive number of bytes is needed, not {max_shard_size}")
    source, destination = Path(src), Path(dst)
    file = read_gguf(source)
    check_destination(source, destination)
    model = architecture.from_metadata(file)
    planned = _match(file, model)
    vocabulary = from_fields(file, model.vocabulary, pre)
    dtype = _main_dtype(file) if dtype == "auto" else dtype
    report = GGUFReport(source, destination, model.family.gguf_name, notes=vocabulary.notes)
    report.types = Counter(tensor.type.name for tensor in file.tensors.values())
    with Staging(destination) as staging:
        _write_tensors(file, planned, dtype, int(max_shard_size), staging, report, progress)
        _write_texts(model, vocabulary, dtype, staging)
        staging.commit()
    return report


def _main_dtype(file: GGUFFile) -> str:
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if tensor.rows > 1:
            sizes[tensor.type.name] += tensor.nbytes
    most = sizes.most_common(1)[0][0] if sizes else ""
    return {"F32": "float32", "F16": "float16"}.get(most, "bfloat16")


def _match(file: GGUFFile, model: Model) -> list[tuple[Planned, GGUFTensor]]:
    """The model's tensors with the file's; every one must be there, in the right shape, and no other."""
    pairs = []
    left = dict(file.tensors)
    left.pop(ROPE_FACTORS, None)
    for planned in model.tensors():
        tensor = left.pop(planned.gguf_name, None)
        if tensor is None:
            raise CheckpointError(f"{file.path}: tensor {planned.gguf_name!r} ({planned.hf_name}) is missing")
        if tensor.shape != planned.shape:
            raise CheckpointError(
                f"{file.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, "
                f"the metadata says {list(planned.shape)}"
            )
        if not can_dequantize(tensor.type):
            raise CheckpointError(
                f"{file.path}: tensor {tensor.name!r} has type {tensor.type.name}, which gguf cannot decode"
            )
        pairs.append((planned, tensor))
    if left:
        names = ", ".join(sorted(left)[:4])
        raise CheckpointError(f"{file.path}: {len(left)} tensors that {model.family.class_name} does not have: {names}")
    return pairs


def _write_tensors(
    file: GGUFFile,
    planned: list[tuple[Planned, GGUFTensor]],
    dtype: str,
    limit: int,
    staging: Staging,
    report: GGUFReport,
    progress: Progress | None,
) -> None:
    code, torch_dtype = _DTYPES[dtype]
    shards: list[list[tuple[Slot, Planned, GGUFTensor]]] = [[]]
    room = limit
    for plan, tensor in planned:
        slot = Slot(plan.hf_name, code, plan.shape)
        if slot.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append((slot, plan, tensor))
        room -= slot.nbytes
    weight_map: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        writer = ShardWriter(staging, name, [slot for slot, _, _ in members], {"format": "pt"})
        for slot, plan, tensor in members:
            if progress is not None:
                progress(len(weight_map), len(planned), slot.name)
            pieces = (tensor_bytes(slab) for slab in _slabs(file, plan, tensor, torch_dtype))
            report.bytes_written += writer.write(slot.name, code, plan.shape, pieces)
            weight_map[slot.name] = name
        writer.finish()
    if len(shards) > 1:
        index = {"metadata": {"total_size": report.bytes_written}, "weight_map": dict(sorted(weight_map.items()))}
        staging.write(INDEX_NAME, json_bytes(index))


def _slabs(file: GGUFFile, plan: Planned, tensor: GGUFTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The tensor decoded, in Hugging Face's order of rows, a number of rows at a time (whole heads where permuted)."""
    if len(tensor.shape) == 1:
        row = file.read_rows(tensor, 0, 1)[0]
        yield _cast(file, tensor, rope.unpermute_rope(row, plan.rope_heads) if plan.rope_heads else row, dtype)
        return
    step = tensor.rows // plan.rope_heads if plan.rope_heads else 1
    at_once = max(1, _SLAB_ELEMENTS // (step * tensor.columns)) * step
    for start in range(0, tensor.rows, at_once):
        stop = min(start + at_once, tensor.rows)
        rows = file.read_rows(tensor, start, stop)
        if plan.rope_heads:
            rows = rope.unpermute_rope(rows, (stop - start) // step)
        yield _cast(file, tensor, rows, dtype)


def _cast(file: GGUFFile, tensor: GGUFTensor, rows: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    result = torch.from_numpy(np.array(rows, np.float32, order="C")).to(dtype)
    if not bool(torch.isfinite(result).all()):
        finite = bool(np.isfinite(rows).all())
        why = f"values beyond the range of {dtype}; ask for bfloat16 or float32" if finite else "NaN or infinity"
        raise CheckpointError(f"{file.path}: tensor {tensor.name!r} holds {why}")
    return result


def _write_texts(model: Model, vocabulary: Vocabulary, dtype: str, staging: Staging) -> None:
    for name, content in tokenizer_files(vocabulary, model.context).items():
        staging.write(name, content)
    special = {f"{key}_token_id": number for key, number in vocabulary.special.items() if key != "unk"}
    config: dict[str, Any] = architecture.to_config(model, dtype) | special
    staging.write("generation_config.json", json_bytes(special))
    staging.write("config.json", json_bytes(config))
