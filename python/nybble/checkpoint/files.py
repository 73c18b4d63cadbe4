"""Where a checkpoint's tensors lie: its shards, their headers, and the checks that no file is trusted without.

The safetensors format (https://github.com/huggingface/safetensors#format) is an 8-byte little-endian header size, a
JSON header and the data. Headers are parsed here rather than by the library, because a message must be able to name
the file and the tensor, and because plain reads keep one tensor in memory where a mapping would count the whole file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError, CheckpointNotFoundError, DestinationExistsError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

# Bits an element takes, by safetensors dtype; the sub-byte and 8-bit floats are only ever copied.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# What a directory may hold instead of safetensors, for the error that says so.
OTHER_WEIGHT_SUFFIXES = (
    ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".ot", ".tflite",
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file; `dtype` is safetensors' name, `start` and `end` count bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class Source:
    """A checkpoint on disk: its shards in order and every tensor by name, in file order."""

    root: Path
    shards: list[Path]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    is_directory: bool = True

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def config(self) -> dict[str, Any] | None:
        """The parsed config.json beside the tensors, or None where there is none.

        Raises:
            CheckpointError: as `read_config`.
        """
        path = self.root / "config.json"
        return read_config(path) if path.is_file() else None


def read_config(path: Path) -> dict[str, Any]:
    """The object in a config.json.

    Raises:
        CheckpointError: it is no JSON object, or what says which model this is, or how it is quantized, is of another
            type than it must be.
    """
    settings = read_json(path)
    names = settings.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{path}: `architectures` is {names!r}; a list of class names is needed")
    for key, kind, needed in (("model_type", str, "a name"), ("quantization_config", dict, "an object")):
        value = settings.get(key)
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{path}: `{key}` is {value!r}; {needed} is needed")
    return settings


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError naming the file if it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, an integer of too many digits, nested too deeply
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, the file holds a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON's escapes can also write half a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _header_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    prefix = file.read(8)
    if prefix.startswith(b"version "):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: not a safetensors file, or truncated: it has only {size} bytes")
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{path}: not a safetensors file, or truncated: a header of {length} bytes is announced, "
            f"the file has {size} bytes"
        )
    return file.read(length)


def _fits(shape: list[int], bits: int) -> bool:
    """Whether 64-bit sizes can count the elements, also as strides, where a size of 0 counts as 1."""
    for size in shape:
        bits *= max(1, size)
        if bits >= 2**63:
            return False
    return True


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One validated header entry; ValueError says what is wrong with it."""
    if not _is_text(name):
        raise ValueError("the name is not valid Unicode")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("dtype, shape and data_offsets are needed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"data_offsets {offsets!r} are not [begin, end]")
    if not _fits(shape, DTYPE_BITS[dtype]):
        raise ValueError(f"shape {shape!r} is more than a tensor can have")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{dtype} {shape} does not end at a whole byte")
    need = bits // 8
    if offsets[1] - offsets[0] != need:
        raise ValueError(
            f"{dtype} {shape} needs {need} bytes, its data_offsets {offsets} span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], data_start + offsets[1])


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors (in data order) and the metadata of one safetensors file, without reading any data.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: the file is truncated or not safetensors; names the file, and the tensor where one is at fault.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = _header_bytes(path, file, size)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(_is_text(k) and _is_text(v) for k, v in metadata.items()):
        raise CheckpointError(f"{path}: not a safetensors file: its __metadata__ does not map strings to strings")
    data_start = 8 + len(raw)
    infos = []
    for name, entry in header.items():
        try:
            infos.append(_tensor_info(path, name, entry, data_start))
        except ValueError as error:
            raise CheckpointError(f"{path}: tensor {name!r}: {error}") from error
    infos.sort(key=lambda info: (info.start, info.end))
    at = data_start
    for info in infos:
        if info.start != at:
            raise CheckpointError(f"{path}: tensor {info.name!r}: its data starts at byte {info.start}, not at {at}")
        at = info.end
        if at > size:
            raise CheckpointError(
                f"{path}: truncated: tensor {info.name!r} ends at byte {at}, the file has {size} bytes"
            )
    if at != size:
        raise CheckpointError(f"{path}: {size - at} bytes follow the last tensor")
    return {info.name: info for info in infos}, metadata


def _leaves(name: str) -> bool:
    """Whether a relative file name could point outside its directory, on any operating system."""
    windows = PureWindowsPath(name)
    return (
        PurePosixPath(name).is_absolute()
        or bool(windows.drive or windows.root)
        or ".." in PurePosixPath(name).parts
        or ".." in windows.parts
    )


def _from_index(directory: Path, index: Path) -> Source:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: `weight_map` (tensor name -> file name) is missing or empty")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or not _is_text(shard) or _leaves(shard):
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to be in {shard!r}; only files inside the directory are allowed"
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise CheckpointNotFoundError(f"{index}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing)}")
    source = Source(directory, [directory / shard for shard in shards])
    for shard in shards:
        tensors, metadata = read_header(directory / shard)
        source.metadata.update(metadata)
        # A tensor that the index places elsewhere is a stale copy; one that it does not mention is still read.
        for name, info in tensors.items():
            if weight_map.get(name, shard) != shard:
                continue
            if name in source.tensors:
                raise CheckpointError(
                    f"{info.path}: tensor {name!r} is also in {source.tensors[name].path}, and {index.name} does not "
                    f"say which of them counts"
                )
            source.tensors[name] = info
        absent = sorted(n for n, where in weight_map.items() if where == shard and n not in tensors)
        if absent:
            raise CheckpointError(
                f"{directory / shard}: tensor {absent[0]!r}, listed in {index.name}, is not in the file"
            )
    return source


def _from_files(root: Path, path: Path, is_directory: bool) -> Source:
    tensors, metadata = read_header(path)
    return Source(root, [path], tensors, metadata, is_directory)


def _nothing_found(directory: Path) -> CheckpointNotFoundError:
    names = sorted(p.name for p in directory.iterdir())
    others = [name for name in names if name.lower().endswith(OTHER_WEIGHT_SUFFIXES)]
    if others:
        what = f"only {', '.join(others[:4])}{' ...' if len(others) > 4 else ''}, which hold weights in another format"
    else:
        what = ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") if names else "an empty directory"
    return CheckpointNotFoundError(
        f"{directory}: no safetensors checkpoint ({SINGLE_NAME} or {INDEX_NAME}); found {what}"
    )


def open_source(path: str | os.PathLike[str]) -> Source:
    """Find the tensors of a checkpoint: a `.safetensors` file, or a directory with one file or with an index of shards.

    Raises:
        CheckpointNotFoundError: `path`, a shard, or any safetensors in the directory is missing.
        CheckpointError: a file is damaged, an index is wrong, or several files have no index.
    """
    path = Path(path)
    if path.is_file():
        return _from_files(path.parent, path, is_directory=False)
    if not path.is_dir():
        raise CheckpointNotFoundError(f"{path}: no such file or directory (a local checkpoint is needed)")
    if (path / SINGLE_NAME).is_file():
        return _from_files(path, path / SINGLE_NAME, is_directory=True)
    if (path / INDEX_NAME).is_file():
        return _from_index(path, path / INDEX_NAME)
    found = sorted(p for p in path.glob("*.safetensors") if p.is_file())
    if [p.name for p in found] == ["adapter_model.safetensors"]:
        raise CheckpointNotFoundError(
            f"{path}: holds an adapter (adapter_model.safetensors), not a model; load it with nybble.load_adapter"
        )
    if len(found) > 1:
        names = ", ".join(p.name for p in found[:4])
        raise CheckpointError(f"{path}: {len(found)} safetensors files ({names} ...) but no {INDEX_NAME}")
    if not found:
        raise _nothing_found(path)
    return _from_files(path, found[0], is_directory=True)


def check_outside(source: Path, destination: Path) -> None:
    """Refuse a destination that is a file or lies in the source.

    Raises:
        DestinationExistsError: it is a file.
        CheckpointError: it is the source, or inside the source.
    """
    if destination.exists() and not destination.is_dir():
        raise DestinationExistsError(f"{destination}: the destination is a file; a new or empty directory is needed")
    target, origin = destination.resolve(), source.resolve()
    if target == origin or (origin.is_dir() and origin in target.parents):
        raise CheckpointError(f"{destination}: the destination is the source {source} or lies inside it")


def check_destination(source: Path, destination: Path) -> None:
    """Refuse a destination that would overwrite anything or that lies in the source.

    Raises:
        DestinationExistsError: it is a file, or a directory with something in it.
        CheckpointError: it is the source, or inside the source.
    """
    check_outside(source, destination)
    if destination.is_dir():
        names = sorted(p.name for p in destination.iterdir())
        if names:
            listed = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            raise DestinationExistsError(f"{destination}: the destination exists and is not empty ({listed})")


def read_bytes(info: TensorInfo, chunk: int = 1 << 23) -> Iterator[bytes]:
    """The tensor's bytes in pieces of at most `chunk`; CheckpointError if the file ends early."""
    with info.path.open("rb") as file:
        file.seek(info.start)
        left = info.nbytes
        while left:
            piece = file.read(min(chunk, left))
            if not piece:
                raise CheckpointError(f"{info.path}: truncated while tensor {info.name!r} was read")
            left -= len(piece)
            yield piece


def read_range(info: TensorInfo, start: int, view: memoryview) -> None:
    """Fill `view` with the tensor's bytes from `start` on; CheckpointError if the file ends early.

    A plain read, not a mapping: a file that is cut short meanwhile is an error here, where a mapping would be a signal
    that kills the process, and what was read does not count as this process's memory afterwards.
    """
    with info.path.open("rb", buffering=0) as file:
        file.seek(info.start + start)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{info.path}: truncated while tensor {info.name!r} was read")
            done += count


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """One tensor in memory of its own (no mapping stays open).

    Raises:
        CheckpointError: a dtype that torch lacks, or the file ends early.
    """
    if info.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{info.path}: tensor {info.name!r} has dtype {info.dtype}, which cannot be computed with"
        )
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    if info.nbytes:
        read_range(info, 0, data.numpy().data)
    return data.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)
