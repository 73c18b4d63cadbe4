"""An output file while it is made: under a temporary name, written at the places that its plan gives the tensors."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError
from .files import SINGLE_NAME
from .writer import ShardLayout, claim, full_disk_names, write_all


def temporary_name(path: Path) -> Path:
    """Where a file lies until its directory is complete."""
    return path.with_name(f".{path.name}.part")


def shard_names(count: int) -> list[str]:
    """The final names of `count` output files."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


class Shard:
    """One output file under its temporary name."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path, self.layout, self.temporary = path, layout, temporary_name(path)
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()

    def is_whole(self) -> bool:
        """Whether an earlier run made this file, with room for all its data."""
        return self.temporary.is_file() and self.temporary.stat().st_size >= self.layout.size

    def open(self) -> None:
        with full_disk_names(self.path):
            self._file = os.fdopen(os.open(self.temporary, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            claim(self._file, self.layout.size, self.path)
            if os.fstat(self._file.fileno()).st_size < self.layout.size:
                self._file.truncate(self.layout.size)

    @property
    def file(self) -> BinaryIO:
        assert self._file is not None
        return self._file

    def write(self, position: int, data: bytes | memoryview) -> None:
        with self._lock, full_disk_names(self.path):
            self.file.seek(position)
            write_all(self.file, data)

    def read_into(self, position: int, view: memoryview) -> None:
        with self._lock:
            self.file.seek(position)
            done = 0
            while done < len(view):
                count = self.file.readinto(view[done:])  # type: ignore[attr-defined]  # opened unbuffered: a FileIO
                if not count:
                    raise CheckpointError(f"{self.path}: truncated while it was being written")
                done += count

    def sync(self) -> None:
        with full_disk_names(self.path):
            os.fsync(self.file.fileno())

    def finish(self, texts: Mapping[str, bytes]) -> None:
        head, tail = self.layout.ends(texts)
        with full_disk_names(self.path):
            self.file.truncate(self.layout.size + len(tail))
        self.write(self.layout.size, tail)
        self.write(0, head)
        self.sync()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
