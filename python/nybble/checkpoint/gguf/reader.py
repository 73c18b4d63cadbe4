"""Reading GGUF files: the header, checked before anything is believed, and rows of tensors.

The header is parsed here rather than by gguf's reader, which maps the whole file, trusts every length in it (an array
that claims 2^60 elements keeps it busy until memory ends) and keeps an array object for every token.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from ...errors import CheckpointError, CheckpointNotFoundError

_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS
_MAX_NESTING = 4
_MAX_ELEMENTS = 1 << 48  # sizes beyond are lies, and products of them stay exact in Python all the same


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file; `shape` is row-major (GGUF's reversed), `start` counts bytes from the file's start."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.columns // block * size


@dataclass
class GGUFFile:
    """A parsed header: metadata by key, tensors by name in the order of the file."""

    path: Path
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GGUFTensor] = field(default_factory=dict)

    def read_rows(self, tensor: GGUFTensor, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor as fp32 [stop - start, columns]; CheckpointError if the file ends early."""
        size = (stop - start) * tensor.row_bytes
        with self.path.open("rb") as file:
            file.seek(tensor.start + start * tensor.row_bytes)
            raw = file.read(size)
        if len(raw) != size:
            raise CheckpointError(f"{self.path}: truncated while tensor {tensor.name!r} was read")
        data = np.frombuffer(raw, np.uint8).reshape(stop - start, tensor.row_bytes)
        # A scale of infinity or NaN in a damaged file is reported by the caller, not warned of here.
        with np.errstate(all="ignore"):
            return np.asarray(dequantize(data, tensor.type), np.float32).reshape(stop - start, tensor.columns)


class _Cursor:
    """Little-endian values from a file, none of which may reach behind its end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.at, self.size = path, 0, size
        self._file = file

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise CheckpointError(
                f"{self.path}: truncated or damaged: {what} takes {count} bytes at byte {self.at}, "
                f"the file has {self.size}"
            )
        self.at += count
        return self._file.read(count)

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str) -> str:
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: damaged: {what} is not UTF-8 ({error})") from error

    def kind(self, what: str) -> GGUFValueType:
        code = self.number("I", what)
        try:
            return GGUFValueType(code)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: damaged: {what} has the unknown value type {code}") from error

    def value(self, kind: GGUFValueType, what: str, depth: int = 0) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text(what)
        if kind != GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind], what)
        if depth == _MAX_NESTING:
            raise CheckpointError(f"{self.path}: damaged: {what} is nested more than {_MAX_NESTING} deep")
        inner, count = self.kind(what), self.number("Q", what)
        if inner in _SCALARS:
            code = _SCALARS[inner]
            raw = self.take(count * struct.calcsize(f"<{code}"), what)
            return list(struct.unpack(f"<{count}{code}", raw))
        return [self.value(inner, what, depth + 1) for _ in range(count)]


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Parse and check the header of a GGUF file (version 2 or 3, little-endian), without reading any tensor.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: it is no GGUF file, truncated or damaged, or has a tensor of a type that cannot be read; the
            message names the file and the key or tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        cursor = _Cursor(path, file, size)
        if size < 24 or cursor.take(4, "the magic") != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file: it does not start with 'GGUF'")
        version = cursor.number("I", "the version")
        if version not in (2, 3):
            hint = " (a big-endian file)" if version & 0xFFFF == 0 else ""
            raise CheckpointError(f"{path}: GGUF version {version}{hint}; versions 2 and 3, little-endian, can be read")
        tensors, pairs = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
        fields: dict[str, Any] = {}
        for _ in range(_plausible(cursor, pairs, 13, "metadata keys")):
            key = cursor.text("a key")
            if key in fields:
                raise CheckpointError(f"{path}: damaged: key {key!r} occurs twice")
            fields[key] = cursor.value(cursor.kind(f"key {key!r}"), f"key {key!r}")
        entries = [_tensor_entry(cursor) for _ in range(_plausible(cursor, tensors, 32, "tensors"))]
    return GGUFFile(path, fields, _place(path, fields, entries, cursor.at, size))


def _plausible(cursor: _Cursor, count: int, least: int, what: str) -> int:
    if count > (cursor.size - cursor.at) // least:
        raise CheckpointError(f"{cursor.path}: truncated or damaged: {count} {what} claimed in {cursor.size} bytes")
    return count


def _tensor_entry(cursor: _Cursor) -> GGUFTensor:
    """One tensor's description; its start is still counted from the start of the data."""
    name = cursor.text("a tensor's name")
    what = f"tensor {name!r}"
    dimensions = cursor.number("I", what)
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise CheckpointError(f"{cursor.path}: {what} has {dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are allowed")
    shape = tuple(reversed([cursor.number("Q", what) for _ in range(dimensions)]))
    code, start = cursor.number("I", what), cursor.number("Q", what)
    if not all(shape) or math.prod(shape) > _MAX_ELEMENTS:
        raise CheckpointError(f"{cursor.path}: {what} has the impossible shape {list(shape)}")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as error:
        raise CheckpointError(f"{cursor.path}: {what} has the unknown type {code}") from error
    block, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise CheckpointError(
            f"{cursor.path}: {what} has rows of {shape[-1]}, which blocks of {block} ({kind.name}) do not divide"
        )
    return GGUFTensor(name, kind, shape, start, math.prod(shape) // block * size)


def _place(
    path: Path, fields: dict[str, Any], entries: list[GGUFTensor], header_end: int, size: int
) -> dict[str, GGUFTensor]:
    """Tensors by name, with their place in the file; none may overlap or reach behind its end."""
    alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}; a power of two is needed")
    data_start = -(-header_end // alignment) * alignment
    placed: dict[str, GGUFTensor] = {}
    end, before = data_start, ""
    for entry in sorted(entries, key=lambda tensor: tensor.start):
        what = f"{path}: tensor {entry.name!r}"
        start = data_start + entry.start
        if entry.name in placed:
            raise CheckpointError(f"{what} occurs twice")
        if entry.start % alignment:
            raise CheckpointError(f"{what} starts at {entry.start}, not at a multiple of {alignment}")
        if start + entry.nbytes > size:
            raise CheckpointError(
                f"{what} ends at byte {start + entry.nbytes}, the file has {size} bytes: truncated or damaged"
            )
        if start < end:
            raise CheckpointError(f"{what} overlaps tensor {before!r}")
        placed[entry.name] = GGUFTensor(entry.name, entry.type, entry.shape, start, entry.nbytes)
        end, before = start + entry.nbytes, entry.name
    return {entry.name: placed[entry.name] for entry in entries}


def can_dequantize(kind: GGMLQuantizationType) -> bool:
    """Whether gguf knows how to decode this type."""
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
