"""Writing a checkpoint as many small tasks: worker threads, a ceiling on memory, and a journal to go on from.

A task makes the tensors that belong to one weight and writes them piece by piece to the places that the plan gives
them, so that what is in the files does not depend on the order, the number of threads, the memory allowed, or how often
the work was interrupted. While it lasts the destination holds a journal and files under temporary names; at the end the
journal says that all is complete, the files get their names, config.json last, and the journal goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError, DestinationExistsError, LayoutError, NonFiniteError
from .files import INDEX_NAME, SINGLE_NAME
from .journal import JOURNAL_NAME, Journal
from .writer import (
    ShardLayout,
    Slot,
    StorageFullError,
    claim,
    full_disk_names,
    make_directory,
    sync_directory,
    write_all,
)

Tick = Callable[[int, str], None]

# Finished tasks are recorded together, since each record waits for the disk: at most this much work is done twice.
SYNC_SECONDS = 1.0
# A piece that a worker holds at once. Larger ones are slower: their pages are new in every weight, where a weight of
# several pieces uses them again (measured, 2 workers: 32 MB read into new pages 16 ms, into used ones 5 ms).
_MAX_ROOM = 16 << 20
_MIN_ROOM = 4 << 20
# What threads and files take beside the buffers that are counted; a fifth more is left to the allocator (measured under
# ceilings of 80 to 512 MB: up to 123 of 128 MB with a tenth).
_RESERVE = 24 << 20
# A task's errors that lie in the data: the same call would only meet them again.
_IN_THE_DATA = (NonFiniteError, LayoutError, CheckpointError)


@dataclass(frozen=True)
class Task:
    """The tensors of one weight.

    Attributes:
        name: for messages and progress. slots: what it writes, of one file. nbytes: of the source, for progress.
        fixed: bytes it holds from beginning to end, whatever `Output.room` is.
        run: makes and writes them; what it returns (JSON) is kept in the journal.
        widest: bytes of the least piece it can work on, beyond `fixed`.
    """

    name: str
    slots: Sequence[Slot]
    nbytes: int
    run: Callable[[Output], dict[str, Any]]
    fixed: int = 0
    widest: int = _MIN_ROOM


class Budget:
    """Bytes that tasks share; those that do not fit wait, in turn."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


class StoppedError(Exception):
    """Another task failed: this one need not go on."""


class _Shard:
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
                count = self.file.readinto(view[done:])  # type: ignore[attr-defined]
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


class Output:
    """What a running task writes to.

    Attributes:
        room: bytes that the task may hold beyond its `fixed` ones.
    """

    def __init__(self, shard: _Shard, task: Task, room: int, advance: Callable[[int], None]) -> None:
        self.room, self.advance = room, advance
        self._shard = shard
        self._slots = {slot.name: slot for slot in task.slots}
        self._done = dict.fromkeys(self._slots, 0)
        self.checksums = dict.fromkeys((s.name for s in task.slots if s.shape is not None), 0)
        self.texts: dict[str, str] = {}

    def append(self, name: str, data: bytes | memoryview) -> None:
        """The next bytes of the tensor `name`."""
        slot, done = self._slots[name], self._done[name]
        if done + len(data) > slot.nbytes:
            raise CheckpointError(
                f"{self._shard.path}: tensor {name!r}: more than the {slot.nbytes} bytes planned came"
            )
        self._shard.write(self._shard.layout.position(name) + done, data)
        self.checksums[name] = zlib.crc32(data, self.checksums[name])
        self._done[name] = done + len(data)

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """Bytes of `name` from `offset` on that were appended before."""
        self._shard.read_into(self._shard.layout.position(name) + offset, view)

    def text(self, name: str, text: str) -> None:
        """The whole of a tensor whose size was not planned."""
        slot = self._slots[name]
        if len(text.encode()) > slot.limit:
            raise CheckpointError(f"{self._shard.path}: tensor {name!r}: more than {slot.limit} bytes of text")
        self.texts[name] = text

    def check_complete(self) -> None:
        for name, slot in self._slots.items():
            if (name not in self.texts) if slot.shape is None else (self._done[name] != slot.nbytes):
                raise CheckpointError(f"{self._shard.path}: tensor {name!r}: not all of it was written")


def temporary_name(path: Path) -> Path:
    """Where a file lies until its directory is complete."""
    return path.with_name(f".{path.name}.part")


def shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def distribute(tasks: Sequence[Task], limit: int) -> list[list[Task]]:
    """Tasks in their order, split into files of at most `limit` bytes (a larger task gets one to itself).

    Raises:
        CheckpointError: two tasks write a tensor of the same name.
    """
    shards: list[list[Task]] = [[]]
    room = limit
    seen: dict[str, str] = {}
    for task in tasks:
        for slot in task.slots:
            if slot.name in seen:
                raise CheckpointError(
                    f"tensor {task.name!r}: the name {slot.name!r} would occur twice (also from {seen[slot.name]!r})"
                )
            seen[slot.name] = task.name
        size = sum(slot.nbytes for slot in task.slots)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(task)
        room -= size
    return shards


class Job:
    """One run over a destination directory: `run` the tasks, then `commit` with the other files.

    The destination is not touched before `run` knows that its tasks can be done in the memory allowed. Leaving the
    `with` block without `commit` keeps what is done, for the same call to go on from it; only after an error that lies
    in the data is it removed, and never what an earlier run did.
    """

    def __init__(
        self,
        destination: Path,
        identity: dict[str, Any],
        *,
        workers: int | None = None,
        max_memory: int | None = None,
        restart: bool = False,
    ) -> None:
        self.destination, self._identity, self._restart = destination, identity, restart
        self._threads = max(1, torch.get_num_threads())
        self.workers = self._threads if workers is None else workers
        self._memory = max_memory
        self._shards: list[_Shard] = []
        self._made: list[Path] = []
        self._started = self._committed = self._spoiled = False
        self._earlier = 0  # records of an earlier run
        self.resumed = 0
        self._kept: dict[str, tuple[Task, dict[str, Any]]] = {}

    def __enter__(self) -> Job:
        return self

    def _start(self) -> None:
        """Take the destination, and go on with what its journal has, or begin."""
        with full_disk_names(self.destination):
            self._made = make_directory(self.destination)
        _check_free(self.destination)
        self._journal = Journal(self.destination)
        try:
            if self._journal.identity is None:
                _check_free(self.destination)
            self._check_same()
        except BaseException:
            if self._journal.identity is None:
                self._remove_journal()
            self._journal.__exit__(None, None, None)
            raise
        self._started = True
        if self._journal.identity is None or self._restart:
            for path in _ours(self.destination):
                if path.name != JOURNAL_NAME:
                    path.unlink()
            self._journal.begin(self._identity)
        self._earlier = len(self._journal.records)

    def _check_same(self) -> None:
        if self._journal.identity is not None and not self._journal.is_of(self._identity) and not self._restart:
            raise DestinationExistsError(
                f"{self.destination}: holds an unfinished run of something else "
                f"({_difference(self._journal.identity, self._identity)}); finish that with the same arguments, or "
                f"discard it with restart=True (--restart)"
            )

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for shard in self._shards:
            shard.close()
        if not self._started or self._committed:
            return
        if not self._journal.records or (self._spoiled and not self._earlier):
            self._clear()
        elif isinstance(value, StorageFullError):
            count = len(self._journal.records)
            value.outcome = f"{count} weights are done and kept in {self.destination}, the same command goes on"
        self._journal.__exit__(None, None, None)

    def _clear(self) -> None:
        """Remove everything of this run, and the directories that it made."""
        folders = set()
        for path in _ours(self.destination):
            if path.name != JOURNAL_NAME:
                path.unlink(missing_ok=True)
                folders.add(path.parent)
        for folder in sorted(folders - {self.destination}, reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._remove_journal()

    def _remove_journal(self) -> None:
        self._journal.remove()
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    # ---- the tasks ---------------------------------------------------------------------------------------------------

    def run(
        self, tasks: Sequence[Task], *, max_shard_size: int, metadata: dict[str, str], tick: Tick = lambda n, name: None
    ) -> list[dict[str, Any]]:
        """Do what is not done yet; returns every task's result, in the order of `tasks`.

        Raises:
            CheckpointError: a task needs more than `max_memory`, or another run is writing there.
            DestinationExistsError: the destination holds other files, or an unfinished run of something else.
            StorageFullError: the disk is full.
            MemoryError: there is none left.
            Whatever a task raises; the others stop.
        """
        budget, share = self._check_memory(tasks)
        groups = distribute(tasks, max_shard_size)
        self._shards = [
            _Shard(self.destination / name, ShardLayout(self.destination / name, slots, metadata))
            for name, slots in zip(
                shard_names(len(groups)), [[s for t in group for s in t.slots] for group in groups], strict=True
            )
        ]
        self._place = {t.name: shard for shard, group in zip(self._shards, groups, strict=True) for t in group}
        self.shards = [shard.path.name for shard in self._shards]
        self._start()
        if any("commit" in record for record in self._journal.records):
            return [self._records()[task.name]["result"] for task in tasks]
        done = self._records()
        for shard in self._shards:
            if not shard.is_whole():
                done = {name: record for name, record in done.items() if self._place.get(name) is not shard}
        for shard in self._shards:
            shard.open()
        self._progress = _Recorder(self._journal, self._shards)
        self._stop = threading.Event()
        self._tick_lock = threading.Lock()
        todo = {}
        threads = (self._threads, self.workers)
        try:
            with ThreadPoolExecutor(self.workers, initializer=_use_threads, initargs=threads) as pool:
                for task in tasks:
                    todo[pool.submit(self._one, task, done.get(task.name), budget, share, tick)] = task
                try:
                    wait(todo, return_when=FIRST_EXCEPTION)
                finally:
                    self._stop.set()
                    for future in todo:
                        future.cancel()
            _raise_first(todo)
        except BaseException:
            with contextlib.suppress(OSError):
                self._progress.close()
            raise
        finally:
            torch.set_num_threads(self._threads)
        self._progress.close()
        results = {task.name: future.result() for future, task in todo.items()}
        self._finish(results)
        return [results[task.name]["result"] for task in tasks]

    def _check_memory(self, tasks: Sequence[Task]) -> tuple[Budget, int]:
        if self._memory is None:
            most = max((task.fixed + max(task.widest, _MAX_ROOM) for task in tasks), default=0)
            return Budget(most + self.workers * _MAX_ROOM), _MAX_ROOM
        total = int(self._memory * 0.8) - _RESERVE
        for task in tasks:
            need = task.fixed + task.widest
            if need > total:
                least = int((need + _RESERVE) / 0.8) + 1
                raise CheckpointError(
                    f"max_memory: {self._memory:,} bytes are too few: {task.name!r} needs at least {least:,}"
                )
        return Budget(total), total // self.workers

    def _records(self) -> dict[str, dict[str, Any]]:
        return {record["task"]: record for record in self._journal.records if "task" in record}

    def _one(
        self, task: Task, earlier: dict[str, Any] | None, budget: Budget, share: int, tick: Tick
    ) -> dict[str, Any]:
        shard = self._place[task.name]
        advanced = 0

        def advance(count: int) -> None:
            nonlocal advanced
            if self._stop.is_set():
                raise StoppedError
            advanced += count
            if count:
                with self._tick_lock:
                    tick(count, task.name)

        advance(0)
        if earlier is not None and self._is_intact(task, shard, earlier):
            with self._tick_lock:
                self.resumed += 1
                self._kept[task.name] = (task, earlier)
            advance(task.nbytes)
            return earlier
        room = min(_MAX_ROOM, max(task.widest, share - task.fixed))
        with budget.hold(task.fixed + room):
            output = Output(shard, task, room, advance)
            with self._judged(task):
                result = task.run(output)
                output.check_complete()
            if self._memory is not None:
                give_back()
        record = {"task": task.name, "result": result, "texts": output.texts, "crc": output.checksums}
        self._progress.add(record, shard)
        advance(task.nbytes - advanced)
        return record

    @contextlib.contextmanager
    def _judged(self, task: Task) -> Iterator[None]:
        """Notice errors that lie in the data; torch's error for a lack of memory becomes Python's."""
        try:
            yield
        except _IN_THE_DATA:
            self._spoiled = True
            raise
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error):
                raise
            raise MemoryError(
                f"{task.name!r}: out of memory; the same call goes on from what is done: give it fewer workers, or a "
                f"lower max_memory"
            ) from error

    def kept(self, name: str) -> dict[str, bytes]:
        """The tensors of a task that an earlier run has done and that this one, come to it, found intact."""
        task, record = self._kept[name]
        shard = self._place[name]
        found = {}
        for slot in task.slots:
            if slot.shape is None:
                found[slot.name] = record["texts"][slot.name].encode()
                continue
            data = bytearray(slot.nbytes)
            shard.read_into(shard.layout.position(slot.name), memoryview(data))
            found[slot.name] = bytes(data)
        return found

    def _is_intact(self, task: Task, shard: _Shard, earlier: dict[str, Any]) -> bool:
        """Whether the file still holds what an earlier run wrote."""
        if earlier["crc"].keys() | earlier["texts"].keys() != {slot.name for slot in task.slots}:
            return False
        view = memoryview(bytearray(1 << 20))
        for slot in task.slots:
            if slot.shape is None:
                continue
            crc, at = 0, 0
            while at < slot.nbytes:
                piece = view[: min(len(view), slot.nbytes - at)]
                shard.read_into(shard.layout.position(slot.name) + at, piece)
                crc = zlib.crc32(piece, crc)
                at += len(piece)
            if crc != earlier["crc"][slot.name]:
                return False
        return True

    def _finish(self, results: Mapping[str, dict[str, Any]]) -> None:
        texts = {name: text.encode() for record in results.values() for name, text in record["texts"].items()}
        for shard in self._shards:
            shard.finish(texts)
            shard.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, after `run`."""
        return self._index()["metadata"]["total_size"]

    def _index(self) -> dict[str, Any]:
        texts = {name: len(text.encode()) for r in self._records().values() for name, text in r["texts"].items()}
        sizes = {
            slot.name: (shard.path.name, texts[slot.name] if slot.shape is None else slot.nbytes)
            for shard in self._shards
            for slot in shard.layout.slots.values()
        }
        return {
            "metadata": {"total_size": sum(size for _, size in sizes.values())},
            "weight_map": {name: sizes[name][0] for name in sorted(sizes)},
        }

    # ---- the end -----------------------------------------------------------------------------------------------------

    def commit(self, files: Mapping[str, bytes | Path]) -> None:
        """Write the other files (contents, or where to copy from), and give all of them their names.

        Raises:
            StorageFullError: the disk is full.
        """
        record = next((record for record in self._journal.records if "commit" in record), None)
        if record is None:
            names = list(self.shards)
            if len(names) > 1:
                files = {INDEX_NAME: (json.dumps(self._index(), indent=2) + "\n").encode(), **files}
            # Readers take a directory for a model when it has config.json, so that comes last.
            for name in sorted(files, key=lambda name: name == "config.json"):
                self._write_file(self.destination / name, files[name])
                names.append(name)
            for folder in {(self.destination / name).parent for name in names}:
                sync_directory(folder)
            record = {"commit": names}
            self._journal.append([record])
            self._journal.records.append(record)
        for name in record["commit"]:
            path = self.destination / name
            if temporary_name(path).exists():
                os.replace(temporary_name(path), path)
            elif not path.exists():
                raise CheckpointError(f"{path}: was complete and has been removed; discard the run with restart=True")
        for folder in {(self.destination / name).parent for name in record["commit"]}:
            sync_directory(folder)
        self._committed = True
        self._journal.remove()

    def _write_file(self, path: Path, content: bytes | Path) -> None:
        with full_disk_names(path):
            make_directory(path.parent)
            with temporary_name(path).open("wb", buffering=0) as file:
                if isinstance(content, bytes):
                    write_all(file, content)
                else:
                    with content.open("rb") as origin:
                        while piece := origin.read(1 << 20):
                            write_all(file, piece)
                os.fsync(file.fileno())


class _Recorder:
    """Finished tasks on their way into the journal, whose files a thread of its own syncs first: no task waits."""

    def __init__(self, journal: Journal, shards: list[_Shard]) -> None:
        self._journal = journal
        self._waiting: list[tuple[dict[str, Any], _Shard]] = []
        self._changed = threading.Condition()
        self._ending = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="nybble-journal", daemon=True)
        self._thread.start()

    def add(self, record: dict[str, Any], shard: _Shard) -> None:
        with self._changed:
            if self._error is not None:
                raise self._error
            self._waiting.append((record, shard))
            self._changed.notify()

    def close(self) -> None:
        """Record what is waiting and end; raises what went wrong."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _loop(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._ending)
                    if not self._ending:
                        self._changed.wait_for(lambda: self._ending, SYNC_SECONDS)
                    taken, self._waiting = self._waiting, []
                    if not taken and self._ending:
                        return
                for shard in {shard for _, shard in taken}:
                    shard.sync()
                records = [record for record, _ in taken]
                self._journal.append(records)
                self._journal.records.extend(records)
        except BaseException as error:  # raised where the thread is waited for
            self._error = error


def _raise_first(todo: Iterable[Future[dict[str, Any]]]) -> None:
    """The error of the task that failed, if one did; the others stopped for it."""
    errors = [error for future in todo if not future.cancelled() and (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, StoppedError):
            raise error


def _use_threads(threads: int, workers: int) -> None:
    # Of this thread alone: OpenMP keeps the number by thread.
    torch.set_num_threads(max(1, threads // workers))


def give_back() -> None:
    """Let the C library return what it keeps of freed memory: it is no one's, but it counts against the ceiling."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _ours(directory: Path) -> list[Path]:
    """The journal and the files under temporary names."""
    found = [p for p in directory.rglob(".*.part") if p.is_file()]
    return found + [p for p in (directory / JOURNAL_NAME,) if p.is_file()]


def _check_free(destination: Path) -> None:
    """Refuse a directory with files of anybody else's in it; a journal with records is an unfinished run's."""
    journal = destination / JOURNAL_NAME
    if journal.is_file() and journal.stat().st_size:
        return
    others = sorted(path.name for path in destination.iterdir() if path != journal)
    if others:
        listed = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        raise DestinationExistsError(f"{destination}: the destination exists and is not empty ({listed})")


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first thing in which two identities differ, for people."""
    for key in sorted(new.keys() | (old.keys() - {"journal"})):
        a, b = old.get(key), json.loads(json.dumps(new.get(key)))
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            return f"{key}: {_difference(a, b)}"
        return f"{key} was {_shown(a)}, is {_shown(b)}"
    return "an older version"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
