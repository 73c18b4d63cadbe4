"""Writing files so that a failed run leaves none under a final name, and safetensors one tensor at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError
from .files import DTYPE_BITS

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class StorageFullError(OSError):
    """No room left for a file that was being written; nothing was left under its final name.

    Attributes:
        outcome: what became of the work, for the message.
    """

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(number, f"{path}: {os.strerror(number).lower()} while writing", str(path))
        self.outcome = "nothing was left behind"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errno, Path(self.filename)), {"outcome": self.outcome}

    def __str__(self) -> str:
        return f"{self.strerror}; {self.outcome}"


def make_directory(path: Path) -> list[Path]:
    """Make a directory and those above it that are missing, for good; returns the ones made, the innermost first."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(made):
        with contextlib.suppress(PermissionError):  # a directory may be written to and searched, but not read
            sync_directory(folder.parent)
    return made


@contextlib.contextmanager
def full_disk_names(path: Path) -> Iterator[None]:
    """Turn "no space left" into an error that names the file being written."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and not isinstance(error, StorageFullError):
            raise StorageFullError(error.errno, path) from error
        raise


class Staging:
    """A set of files that appear in `directory` all together, or not at all.

    Each is written under a temporary name in the same directory and synced; `commit` renames them in the order in
    which they were opened. Leaving the `with` block without `commit` removes them, and the directory if it was made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._made: list[Path] = []
        self._open: dict[str, BinaryIO] = {}
        self._names: list[str] = []
        self._folders: list[Path] = []  # made for files, the outermost first

    def __enter__(self) -> Staging:
        with full_disk_names(self.directory):
            self._made = make_directory(self.directory)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for file in self._open.values():
            with contextlib.suppress(OSError):  # a full disk can fail the flush; the file is removed next
                file.close()
        self._open.clear()
        for name in self._names:
            self._temporary(name).unlink(missing_ok=True)
        for folder in [*reversed(self._folders), *self._made]:
            with contextlib.suppress(OSError):  # not empty: committed
                folder.rmdir()

    def _temporary(self, name: str) -> Path:
        path = self.directory / name
        return path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def path(self, name: str) -> Path:
        """Where the file is until `commit`."""
        return self._temporary(name)

    def open(self, name: str) -> BinaryIO:
        """A new binary file that `commit` will call `name`; close it with `close(name)`."""
        path = self._temporary(name)
        with full_disk_names(self.directory / name):
            self._folders += reversed(make_directory(path.parent))
            file = path.open("wb", buffering=0)
        self._names.append(name)
        self._open[name] = file
        return file

    def close(self, name: str) -> None:
        """Flush and sync the file to the disk."""
        with full_disk_names(self.directory / name), self._open.pop(name) as file:
            os.fsync(file.fileno())

    def write(self, name: str, pieces: bytes | Iterable[bytes]) -> None:
        """Write a whole file from one or more pieces."""
        file = self.open(name)
        for piece in (pieces,) if isinstance(pieces, bytes) else pieces:
            with full_disk_names(self.directory / name):
                write_all(file, piece)
        self.close(name)

    def commit(self) -> None:
        """Give every file its final name and sync the directories."""
        for name in list(self._open):
            self.close(name)
        for name in self._names:
            os.replace(self._temporary(name), self.directory / name)
        for folder in {(self.directory / name).parent for name in self._names} | {self.directory}:
            sync_directory(folder)
        self._names.clear()


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write every byte to an unbuffered file, which may take less than it is given."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += file.write(view[done:])


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, row-major, without a copy where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


@dataclass(frozen=True)
class Slot:
    """A tensor to come: `shape` is None where only its data tells (a JSON text), at most `limit` bytes long."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    limit: int = 0

    @property
    def nbytes(self) -> int:
        """Its size; for a text the most it may be."""
        if self.shape is None:
            return self.limit
        count = 1
        for size in self.shape:
            count *= size
        return (count * DTYPE_BITS[self.dtype] + 7) // 8


class ShardLayout:
    """Where each tensor of a safetensors file lies, known before any of them is computed.

    All sizes but those of short texts are known. So the data of known size gets its place at once (largest element
    first, which keeps every tensor aligned to its dtype), texts follow behind it in the order of their slots, and the
    header, whose length depends on the texts' offsets by a few digits, goes into room reserved for the longest it can
    be, filled up with spaces as the format allows.

    Attributes:
        slots: by name. size: bytes of the file without its texts.
    """

    def __init__(self, path: Path, slots: Iterable[Slot], metadata: dict[str, str]) -> None:
        planned = list(slots)
        self.slots = {slot.name: slot for slot in planned}
        if len(self.slots) != len(planned):
            raise CheckpointError(f"{path}: a tensor name is planned twice")
        self._metadata = metadata
        fixed = sorted((s for s in planned if s.shape is not None), key=lambda s: (-DTYPE_BITS[s.dtype], s.name))
        self._offsets: dict[str, int] = {}
        at = 0
        for slot in fixed:
            self._offsets[slot.name] = at
            at += slot.nbytes
        self._data_bytes = at
        limit = at + sum(s.nbytes for s in planned if s.shape is None)
        longest = {
            s.name: self._entry(s.dtype, [s.limit] if s.shape is None else s.shape, limit, limit) for s in planned
        }
        self._header_size = (len(self._header(longest)) + 7) // 8 * 8
        self.size = 8 + self._header_size + at

    @staticmethod
    def _entry(dtype: str, shape: Iterable[int], begin: int, end: int) -> dict[str, object]:
        return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}

    def _header(self, entries: dict[str, dict[str, object]]) -> bytes:
        return json.dumps({"__metadata__": self._metadata, **entries}, separators=(",", ":")).encode()

    def position(self, name: str) -> int:
        """The byte of the file at which a tensor of known size begins."""
        return 8 + self._header_size + self._offsets[name]

    def ends(self, texts: Mapping[str, bytes]) -> tuple[bytes, bytes]:
        """What is written last: the file's beginning up to the data, and the texts, which go to byte `size`."""
        entries = {}
        for name, begin in self._offsets.items():
            slot = self.slots[name]
            entries[name] = self._entry(slot.dtype, slot.shape or (), begin, begin + slot.nbytes)
        at = self._data_bytes
        tail = []
        for name, slot in self.slots.items():
            if slot.shape is None:
                text = texts[name]
                entries[name] = self._entry(slot.dtype, [len(text)], at, at + len(text))
                at += len(text)
                tail.append(text)
        header = self._header(entries).ljust(self._header_size)
        return self._header_size.to_bytes(8, "little") + header, b"".join(tail)


def claim(file: BinaryIO, size: int, path: Path) -> None:
    """Claim a file's room on the disk, where the system can, so that a full disk shows before the work, not after."""
    if hasattr(os, "posix_fallocate") and size:
        with full_disk_names(path):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                    raise


def sync_directory(directory: Path) -> None:
    """Make the names in a directory last, where the system can be told to."""
    if os.name == "posix":  # a directory cannot be opened for syncing elsewhere
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class ShardWriter:
    """A safetensors file of a `Staging`, written tensor by tensor in any order, holding none of them."""

    def __init__(self, staging: Staging, name: str, slots: list[Slot], metadata: dict[str, str]) -> None:
        self.staging, self.name, self.path = staging, name, staging.directory / name
        self._layout = ShardLayout(self.path, slots, metadata)
        self._texts: dict[str, bytes] = {}
        self._written: set[str] = set()
        self._file = staging.open(name)
        claim(self._file, self._layout.size, self.path)

    def _slot(self, name: str, dtype: str, shape: tuple[int, ...]) -> Slot:
        slot = self._layout.slots.get(name)
        if slot is None or slot.dtype != dtype or (slot.shape is not None and slot.shape != shape):
            planned = "nothing" if slot is None else f"{slot.dtype} {slot.shape}"
            raise CheckpointError(f"{self.path}: tensor {name!r}: {planned} was planned, {dtype} {shape} came")
        if name in self._written:
            raise CheckpointError(f"{self.path}: tensor {name!r} came twice")
        self._written.add(name)
        return slot

    def write(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[bytes | memoryview]) -> int:
        """Put one tensor's bytes in their place and return their number.

        Raises:
            CheckpointError: it was not planned so.
            StorageFullError: the disk is full.
        """
        slot = self._slot(name, dtype, shape)
        if slot.shape is None:
            text = b"".join(bytes(piece) for piece in pieces)
            if len(text) > slot.limit:
                raise CheckpointError(f"{self.path}: tensor {name!r}: {len(text)} bytes, at most {slot.limit} planned")
            self._texts[name] = text
            return len(text)
        done = 0
        with full_disk_names(self.path):
            self._file.seek(self._layout.position(name))
        for piece in pieces:
            with full_disk_names(self.path):
                write_all(self._file, piece)
            done += len(piece)
        if done != slot.nbytes:
            raise CheckpointError(f"{self.path}: tensor {name!r}: {done} bytes came, {slot.nbytes} planned")
        return done

    def finish(self) -> None:
        """Write the texts and the header and sync the file; every planned tensor must have come."""
        left = sorted(self._layout.slots.keys() - self._written)
        if left:
            raise CheckpointError(f"{self.path}: tensor {left[0]!r} was never written")
        head, tail = self._layout.ends(self._texts)
        with full_disk_names(self.path):
            self._file.seek(self._layout.size)
            write_all(self._file, tail)
            self._file.seek(0)
            write_all(self._file, head)
        self.staging.close(self.name)
