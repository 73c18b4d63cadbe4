"""The journal of a long piece of work on a directory: what is done already, so that the same command can go on.

One line a record, each led by the CRC-32 of its text: the first says whose work it is, the others what is finished. A
record is written only after the data that it speaks of is on the disk; a last line that was cut off by a crash fails
its checksum and is dropped, with whatever follows it.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..errors import CheckpointError
from .writer import full_disk_names, sync_directory, write_all

JOURNAL_NAME = ".nybble-journal"
_VERSION = 1
# What a lock that somebody else holds looks like; anything else says that the file system cannot lock.
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}

# A place in the file that no journal comes to.
_UNUSED = (1 << 31) - 2


class BusyError(CheckpointError):
    """Another process is writing to the same directory."""


def _lock(file: BinaryIO, path: Path) -> bool:
    """Take the file for this process for as long as it is open; the system lets go of it when the process dies.

    False if another process has it; OSError if the file system has no locks, or none left.
    """
    try:
        if os.name == "nt":
            import msvcrt

            # No one else can read a byte that is locked there, and others look for whose journal this is.
            file.seek(_UNUSED)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            file.seek(0)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise OSError(
            error.errno, f"cannot be locked ({error.strerror}), which keeps two runs apart", str(path)
        ) from error
    return True


class Journal:
    """The locked journal of a directory; a context manager that closes it and keeps the file.

    Attributes:
        identity: what the work is, as it was recorded; None in a new journal.
        records: of the earlier run, in order.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / JOURNAL_NAME
        self._append_lock = threading.Lock()
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self._file: BinaryIO = os.fdopen(handle, "r+b", buffering=0)
            try:
                taken = not _lock(self._file, self.path)
            except OSError:
                self._file.close()
                raise
            if taken:
                self._file.close()
                raise BusyError(f"{directory}: another run is writing there; wait for it, or choose another place")
            # The run that held the lock before may have finished and removed the file that was just opened.
            if self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                break
            self._file.close()
        self.identity: dict[str, Any] | None = None
        self.records: list[dict[str, Any]] = []
        self._read()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def _read(self) -> None:
        data = self._file.readall()  # type: ignore[attr-defined]
        good = 0
        found = []
        for line in data.splitlines(keepends=True):
            record = _parse(line)
            if record is None:
                break
            found.append(record)
            good += len(line)
        self._file.truncate(good)
        self._file.seek(good)
        if found:
            self.identity, self.records = found[0], found[1:]

    def begin(self, identity: dict[str, Any]) -> None:
        """Start anew, as the work that `identity` (JSON) describes."""
        self._file.truncate(0)
        self._file.seek(0)
        self.identity, self.records = {"journal": _VERSION, **identity}, []
        self.append([self.identity])
        sync_directory(self.path.parent)

    def is_of(self, identity: dict[str, Any]) -> bool:
        return self.identity == _stored(identity)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Write records and sync, from any thread; what they speak of must be on the disk already."""
        lines = b""
        for record in records:
            text = json.dumps(record, separators=(",", ":")).encode()
            lines += f"{zlib.crc32(text):08x} ".encode() + text + b"\n"
        with self._append_lock, full_disk_names(self.path):
            write_all(self._file, lines)
            os.fsync(self._file.fileno())

    def remove(self) -> None:
        """The work is over: remove the file, which is the last step."""
        if os.name == "nt":  # where no file that is open can be removed
            self._file.close()
        self.path.unlink(missing_ok=True)
        self._file.close()


def is_of(directory: Path, identity: dict[str, Any]) -> bool:
    """Whether a directory holds the journal of the work that `identity` describes, which another process may have."""
    try:
        with (directory / JOURNAL_NAME).open("rb") as file:
            found = _parse(file.readline())
    except FileNotFoundError:
        return False
    return found == _stored(identity)


def _stored(identity: dict[str, Any]) -> Any:
    return json.loads(json.dumps({"journal": _VERSION, **identity}))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        if not line.endswith(b"\n") or int(line[:8], 16) != zlib.crc32(line[9:-1]):
            return None
        record = json.loads(line[9:-1])
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
