"""Writing a checkpoint as many small tasks, in a destination that is whole or not there, with a journal to go on from.

A task makes the tensors that belong to one weight and writes them piece by piece to the places that the plan gives
them, so that what is in the files does not depend on the order, the number of threads, the memory allowed, or how often
the work was interrupted. While it lasts the destination holds a journal and files under temporary names; at the end the
journal says that all is complete, the files get their names, config.json last, and the journal goes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import CheckpointError, DestinationExistsError
from .files import INDEX_NAME
from .journal import JOURNAL_NAME, Journal
from .recorder import Recorder, Records
from .shard import Shard, shard_names, temporary_name
from .task import Task, Tick, distribute
from .team import LostProcessError
from .workers import Workers
from .writer import ShardLayout, StorageFullError, full_disk_names, make_directory, sync_directory, write_all


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
        sharing: int = 1,
        restart: bool = False,
    ) -> None:
        """`sharing`: processes that share `max_memory`; see `nybble.quantize` for the rest."""
        self.destination, self._identity, self._restart = destination, identity, restart
        self._workers = Workers(workers, max_memory, sharing)
        self.kept = self._workers.kept
        self._log: Records
        self._shards: list[Shard] = []
        self._mine: list[Shard] = []  # what this process makes of them
        self._made: list[Path] = []
        self._started = self._committed = False
        self._earlier = 0  # records of an earlier run

    def __enter__(self) -> Job:
        return self

    def _start(self, tasks: Sequence[Task]) -> None:
        """Take the destination, and go on with what its journal has, or begin."""
        with full_disk_names(self.destination):
            self._made = make_directory(self.destination)
        _check_free(self.destination)
        self._journal = Journal(self.destination)
        self._log = self._journal
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
                f"({difference(self._journal.identity, self._identity)}); finish that with the same arguments, or "
                f"discard it with restart=True (--restart)"
            )

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for shard in self._shards:
            shard.close()
        if not self._started or self._committed:
            return
        if not self._journal.records or (self._workers.spoiled and not self._earlier):
            self._clear()
        elif isinstance(value, StorageFullError | LostProcessError):
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
        self._workers.check_memory(tasks)
        self._lay_out(tasks, max_shard_size, metadata)
        self._start(tasks)
        if not any("commit" in record for record in self._log.records):
            self._work(tasks, tick)
        records = self._records()
        return [records[task.name]["result"] for task in tasks]

    def _lay_out(self, tasks: Sequence[Task], max_shard_size: int, metadata: dict[str, str]) -> None:
        groups = distribute(tasks, max_shard_size)
        self._shards = [
            Shard(self.destination / name, ShardLayout(self.destination / name, slots, metadata))
            for name, slots in zip(
                shard_names(len(groups)), [[s for t in group for s in t.slots] for group in groups], strict=True
            )
        ]
        self._place = {t.name: shard for shard, group in zip(self._shards, groups, strict=True) for t in group}
        self._mine = self._shards
        self.shards = [shard.path.name for shard in self._shards]

    def _work(self, tasks: Sequence[Task], tick: Tick) -> None:
        """Do the tasks and complete their files."""
        done = self._records()
        for shard in self._mine:
            if not shard.is_whole():
                done = {name: record for name, record in done.items() if self._place.get(name) is not shard}
        for shard in self._mine:
            shard.open()
        recorder = Recorder(self._log)
        try:
            mine = [task for task in tasks if self._place[task.name] in self._mine]
            records = self._workers.run(mine, self._place, done, recorder, tick)
        except BaseException:
            with contextlib.suppress(OSError):
                recorder.close()
            raise
        recorder.close()
        texts = {name: text.encode() for record in records.values() for name, text in record["texts"].items()}
        for shard in self._mine:
            shard.finish(texts)
            shard.close()

    def _records(self) -> dict[str, dict[str, Any]]:
        return {record["task"]: record for record in self._log.records if "task" in record}

    @property
    def resumed(self) -> int:
        """Tasks that an earlier run had done."""
        return self._workers.resumed

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


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first thing in which two identities differ, for people."""
    for key in sorted(new.keys() | (old.keys() - {"journal"})):
        a, b = old.get(key), json.loads(json.dumps(new.get(key)))
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            return f"{key}: {difference(a, b)}"
        return f"{key} was {_shown(a)}, is {_shown(b)}"
    return "an older version"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
