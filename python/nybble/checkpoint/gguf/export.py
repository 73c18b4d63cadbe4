"""A Hugging Face directory, plain or quantized, into a GGUF file."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from ...errors import CheckpointError, DestinationExistsError
from ...tensor import QuantTensor
from ..bnb import Groups, group, source_quantization
from ..files import TORCH_DTYPES, Source, TensorInfo, open_source, read_tensor
from ..writer import Staging, full_disk_names, write_all
from . import architecture, rope
from .architecture import ROPE_FACTORS, Model, Planned
from .report import GGUFReport, Progress
from .tokenizer_json import read_vocabulary

# What `export_gguf` writes: the type of most matrices, and the number by which a file states it.
TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
}
# The largest value that a type holds: scales and offsets are fp16, times the largest code.
_LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0, "Q4_1": 65504.0}
_SLAB_ELEMENTS = 1 << 21  # quantized at a time; gguf's numpy code takes about ten times that in bytes


def export(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    type: str,
    name: str | None,
    pre: str | None,
    context: int | None,
    progress: Progress | None,
) -> GGUFReport:
    """`nybble.export_gguf`."""
    if type not in TYPES:
        raise ValueError(f"type is {type!r}; allowed are {', '.join(TYPES)}")
    source, destination = open_source(src), Path(dst)
    if destination.exists():
        raise DestinationExistsError(f"{destination}: exists already; a GGUF file is written anew, never over another")
    if not source.is_directory or not (source.root / "config.json").is_file():
        raise CheckpointError(f"{src}: a directory with config.json is needed")
    tensors = _Tensors(source)
    path = source.root / "config.json"
    model = architecture.from_config(tensors.config, tensors.shapes, path, context)
    planned = _match(tensors, model)
    vocabulary = read_vocabulary(source.root, tensors.config, pre)
    vocabulary.pad_to(model.vocabulary, str(source.root / "tokenizer.json"))
    report = GGUFReport(Path(src), destination, model.family.gguf_name, notes=vocabulary.notes)

    def write_metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_type("model")
        writer.add_name(name or Path(src).resolve().name)
        writer.add_file_type(TYPES[type][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        architecture.write_metadata(model, writer)
        vocabulary.write(writer)

    if type.startswith("q4") and tensors.is_4bit:
        report.notes.append(
            f"the weights had 4 bits already and {type} rounds them again, which loses far more than q8_0"
        )
    typed = [(plan, _tensor_type(plan, model, TYPES[type][0], report)) for plan in planned]
    _write(destination, model, typed, tensors, write_metadata, report, progress)
    return report


class _Tensors:
    """The tensors of a directory by Hugging Face name, quantized ones decoded."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.config: dict[str, Any] = source.config() or {}
        self._groups: Groups = group(source.tensors, str(source.root))
        method = source_quantization(self.config)
        if method is not None and not self._groups.quantized:
            raise CheckpointError(f"{source.root}: quantized by {method!r}, whose layout nybble does not read")
        self._modules = {f"{module}.weight": module for module in self._groups.quantized}
        self.shapes: dict[str, tuple[int, ...]] = {key: source.tensors[key].shape for key in self._groups.plain}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes or name in self._modules

    def names(self) -> set[str]:
        return {*self.shapes, *self._modules}

    @property
    def is_4bit(self) -> bool:
        return any("SCB" not in members for members in self._groups.quantized.values())

    def where(self, name: str) -> str:
        return f"{self.source.tensors[name].path}: tensor {name!r}"

    def slabs(self, name: str, shape: tuple[int, ...], step: int) -> Iterator[np.ndarray]:
        """The tensor as fp32 [rows, columns] pieces, each a multiple of `step` rows; a vector is one piece."""
        if name in self._modules:
            weight = self._quantized(name, shape)
            if weight.block_size:  # a slab begins with a block
                step *= weight.block_size // math.gcd(step * shape[1], weight.block_size)
            absmax = weight.absmax_float()
        at_once = max(1, _SLAB_ELEMENTS // (step * shape[-1])) * step
        if name in self._modules:
            for start in range(0, shape[0], at_once):
                yield _rows(weight, absmax, start, min(start + at_once, shape[0])).dequantize().numpy()
            return
        info = self.source.tensors[name]
        if info.dtype not in TORCH_DTYPES or not TORCH_DTYPES[info.dtype].is_floating_point:
            raise CheckpointError(f"{self.where(name)} has dtype {info.dtype}; F32, F16, BF16 or F64 is needed")
        if len(shape) == 1:
            yield read_tensor(info).float().numpy()
            return
        row = info.nbytes // shape[0]
        for start in range(0, shape[0], at_once):
            stop = min(start + at_once, shape[0])
            part = TensorInfo(
                name, info.dtype, (stop - start, shape[1]), info.path, info.start + start * row, info.start + stop * row
            )
            yield read_tensor(part).float().numpy()

    def _quantized(self, name: str, shape: tuple[int, ...]) -> QuantTensor:
        members = self._groups.quantized[self._modules[name]]
        state = {key: read_tensor(self.source.tensors[member]) for key, member in members.items()}
        weight = QuantTensor.from_state(state, name=self.where(name))
        if weight.shape != shape:
            raise CheckpointError(f"{self.where(name)} has shape {list(weight.shape)}, config.json says {list(shape)}")
        return weight


def _rows(weight: QuantTensor, absmax: torch.Tensor, start: int, stop: int) -> QuantTensor:
    """Rows [start, stop) of a weight, fp32 when decoded; for 4 bits, `start` is where a block starts."""
    columns, size = weight.shape[1], weight.block_size
    if size:
        packed = weight.packed.reshape(-1)[start * columns // 2 : (stop * columns + 1) // 2].reshape(-1, 1)
        absmax = absmax[start * columns // size : -(-stop * columns // size)]
    else:
        packed, absmax = weight.packed[start:stop], absmax[start:stop]
    shape = (stop - start, columns)
    return QuantTensor(packed, absmax, weight.codebook, size, shape, torch.float32, weight.format)


def _match(tensors: _Tensors, model: Model) -> list[Planned]:
    """The model's tensors in order; every one must be there in its shape, and no other that matters."""
    planned = list(model.tensors())
    for plan in planned:
        if plan.hf_name not in tensors:
            raise CheckpointError(f"{tensors.source.root}: tensor {plan.hf_name!r} is missing")
        shape = tensors.shapes.get(plan.hf_name, plan.shape)
        if shape != plan.shape:
            raise CheckpointError(
                f"{tensors.where(plan.hf_name)} has shape {list(shape)}, config.json says {list(plan.shape)}"
            )
    # A tied head may lie in the file all the same, and old files keep the rotary frequencies.
    left = tensors.names() - {plan.hf_name for plan in planned} - {"lm_head.weight"}
    left = {name for name in left if not name.endswith("rotary_emb.inv_freq")}
    if left:
        names = ", ".join(sorted(left)[:4])
        raise CheckpointError(
            f"{tensors.source.root}: {len(left)} tensors have no place in a {model.family.gguf_name} GGUF file: {names}"
        )
    return planned


def _tensor_type(plan: Planned, model: Model, wanted: GGMLQuantizationType, report: GGUFReport) -> GGMLQuantizationType:
    if len(plan.shape) == 1:
        return GGMLQuantizationType.F32
    is_output = plan.hf_name == ("model.embed_tokens.weight" if model.tied else "lm_head.weight")
    kind = wanted
    if is_output and wanted in {GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1}:
        kind = GGMLQuantizationType.Q8_0
    if plan.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        report.notes.append(f"{plan.gguf_name} stays F16: its rows of {plan.shape[-1]} are no multiple of 32")
        kind = GGMLQuantizationType.F16
    return kind


def _nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    count = 1
    for length in shape:
        count *= length
    return count // block * size


def _write(
    destination: Path,
    model: Model,
    planned: list[tuple[Planned, GGMLQuantizationType]],
    tensors: _Tensors,
    write_metadata: Callable[[gguf.GGUFWriter], None],
    report: GGUFReport,
    progress: Progress | None,
) -> None:
    """Header through gguf's writer, then the data tensor by tensor; only the finished file gets its name."""
    factors = None
    if model.scaling and model.scaling["rope_type"] == "llama3":
        factors = rope.llama3_factors(model.scaling, model.head_dim, model.theta)
    with Staging(destination.parent) as staging, full_disk_names(destination):
        file: Any = staging.open(destination.name)
        with closing(gguf.GGUFWriter(file.name, model.family.gguf_name)) as writer:
            write_metadata(writer)
            if factors is not None:
                writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
            for plan, kind in planned:
                size = _nbytes(plan.shape, kind)
                writer.add_tensor_info(plan.gguf_name, plan.shape, np.dtype(np.float32), size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            alignment = writer.data_alignment
        at = file.seek(0, os.SEEK_END)
        _claim(file, at, sum(_nbytes(plan.shape, kind) + alignment for plan, kind in planned))
        at = _pad(file, at, alignment)
        if factors is not None:
            write_all(file, factors.data.cast("B"))
            at = _pad(file, at + factors.nbytes, alignment)
            report.types["F32"] += 1
        for done, (plan, kind) in enumerate(planned):
            if progress is not None:
                progress(done, len(planned), plan.hf_name)
            for piece in _encoded(tensors, plan, kind):
                write_all(file, piece)
                at += len(piece)
            at = _pad(file, at, alignment)
            report.types[kind.name] += 1
            report.bytes_written += _nbytes(plan.shape, kind)
        file.truncate(at)
        staging.commit()


def _claim(file: Any, at: int, size: int) -> None:
    """Take the room on the disk first, so that a full one shows before the work."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), at, size)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                raise


def _pad(file: Any, at: int, alignment: int) -> int:
    missing = -at % alignment
    write_all(file, b"\0" * missing)
    return at + missing


def _encoded(tensors: _Tensors, plan: Planned, kind: GGMLQuantizationType) -> Iterator[memoryview]:
    step = plan.shape[0] // plan.rope_heads if plan.rope_heads else 1
    for rows in tensors.slabs(plan.hf_name, plan.shape, step):
        if plan.rope_heads:
            rows = rope.permute_rope(rows, rows.shape[0] // step)
        largest = float(np.abs(rows).max(initial=0.0))
        limit = _LARGEST.get(kind.name)
        if not np.isfinite(largest):
            raise CheckpointError(f"{tensors.where(plan.hf_name)} holds NaN or infinity")
        if limit is not None and largest > limit:
            raise CheckpointError(
                f"{tensors.where(plan.hf_name)} holds {largest:g}, more than {kind.name} can: export as bf16 or f32"
            )
        # A block of tiny numbers has an inverse scale of infinity and a scale of zero: it is stored as zeros.
        with np.errstate(all="ignore"):
            encoded = gguf.quants.quantize(np.ascontiguousarray(rows, np.float32), kind)
        yield np.ascontiguousarray(encoded).reshape(-1).view(np.uint8).data
