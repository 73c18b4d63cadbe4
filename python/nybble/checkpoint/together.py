"""A job that several processes do: each makes some of the files, the first keeps the journal and gives the names.

The plan says where every byte goes, so that it makes no difference who writes it. A file is one process's, since the
clients of a shared file system do not agree on what others write to the same file meanwhile.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import CheckpointError
from .job import Job, difference
from .journal import is_of
from .task import StoppedError, Task, Tick
from .team import Leader, Member, Team

# A client of NFS may believe for 30 to 60 seconds that a directory is absent because it was.
VISIBLE_SECONDS = 90.0


def job_of(team: Team | None, destination: Path, identity: dict[str, Any], **options: Any) -> Job:
    """The job of this process, which has `team` beside it or is the only one; for `options` see `Job`."""
    if team is None:
        return Job(destination, identity, **options)
    if isinstance(team, Leader):
        return LeadersJob(destination, identity, team=team, sharing=team.sharing, **options)
    return MembersJob(destination, identity, team=team, sharing=team.sharing, **options)


def spread(loads: Sequence[int], size: int) -> list[int]:
    """Which process makes which file: the largest first, each to the one that has least so far.

    >>> spread([5, 5, 5, 2, 2], 2)
    [0, 1, 0, 1, 1]
    """
    heap = [(0, 0, rank) for rank in range(size)]
    owners = [0] * len(loads)
    for index in sorted(range(len(loads)), key=lambda index: (-loads[index], index)):
        load, files, rank = heapq.heappop(heap)
        owners[index] = rank
        heapq.heappush(heap, (load + loads[index], files + 1, rank))
    return owners


class LeadersJob(Job):
    """Of the first process."""

    def __init__(self, destination: Path, identity: dict[str, Any], *, team: Leader, **options: Any) -> None:
        super().__init__(destination, identity, **options)
        self._team = team
        self._tick_lock = threading.Lock()

    def run(
        self, tasks: Sequence[Task], *, max_shard_size: int, metadata: dict[str, str], tick: Tick = lambda n, name: None
    ) -> list[dict[str, Any]]:
        """See `Job.run`.

        Raises:
            CheckpointError: also where another process is about to do something else.
            LostProcessError: another process has ended.
        """

        def one_at_a_time(count: int, name: str) -> None:
            with self._tick_lock:
                tick(count, name)

        self._tick = one_at_a_time
        return super().run(tasks, max_shard_size=max_shard_size, metadata=metadata, tick=one_at_a_time)

    def _start(self, tasks: Sequence[Task]) -> None:
        for rank, identity in self._team.identities().items():
            if identity != self._identity:
                raise CheckpointError(
                    f"rank {rank} of {self._team.size} processes ({self._team.where(rank)}) is about to do something "
                    f"else than rank 0 ({difference(self._identity, identity)}); all need the same files and arguments"
                )
        super()._start(tasks)
        done = self._records().keys()
        loads = dict.fromkeys(self._shards, 0)
        for task in tasks:  # what is done is read once more, in its final size
            loads[self._place[task.name]] += sum(s.nbytes for s in task.slots) if task.name in done else task.nbytes
        owners = spread(list(loads.values()), self._team.size)
        self._mine = [shard for shard, owner in zip(self._shards, owners, strict=True) if owner == 0]
        told = {"records": list(self._log.records), "owners": owners}
        self._team.begin(told, self._add, self._tick, self._workers.stop)

    def _add(self, records: list[dict[str, Any]]) -> None:
        self._journal.append(records)
        self._journal.records.extend(records)

    def _work(self, tasks: Sequence[Task], tick: Tick) -> None:
        try:
            super()._work(tasks, tick)
        except StoppedError:
            self._team.check()
            raise
        self._team.wait_finished()

    def commit(self, files: Mapping[str, bytes | Path]) -> None:
        """See `Job.commit`."""
        self._team.tell("records", list(self._log.records))
        super().commit(files)
        self._team.tell("end", True)

    @property
    def resumed(self) -> int:
        """Tasks that an earlier run had done."""
        return self._workers.resumed + self._team.resumed

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if value is not None:
            self._team.stop(value)  # before anything is removed
            self._workers.spoiled |= self._team.spoiled
        super().__exit__(kind, value, tb)


class MembersJob(Job):
    """Of every other process."""

    def __init__(self, destination: Path, identity: dict[str, Any], *, team: Member, **options: Any) -> None:
        super().__init__(destination, identity, **options)
        self._team = team

    def _start(self, tasks: Sequence[Task]) -> None:
        told = self._team.begin(self._identity, self._workers.stop)
        if not any("commit" in record for record in told["records"]):  # else rank 0 may have removed it by now
            self._wait_for_destination()
        self._log = self._team
        self._log.records = told["records"]
        self._mine = [s for s, owner in zip(self._shards, told["owners"], strict=True) if owner == self._team.rank]

    def _wait_for_destination(self) -> None:
        """Until this process sees the first one's journal."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not is_of(self.destination, self._identity):
            self._team.check()
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{self.destination}: rank {self._team.rank} of {self._team.size} processes ({self._team.where}) "
                    f"does not see there what rank 0 has written; they need a file system that they share"
                )
            time.sleep(0.1)

    def _work(self, tasks: Sequence[Task], tick: Tick) -> None:
        try:
            super()._work(tasks, lambda count, name: self._team.tick(count, name))
        except StoppedError:
            self._team.check()
            raise
        self._log.records = self._team.finish(self._workers.resumed)

    def commit(self, files: Mapping[str, bytes | Path]) -> None:
        """Wait until the first process has done it."""
        self._team.wait_end()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for shard in self._shards:
            shard.close()
        if value is not None:
            self._team.fail(value, self._workers.spoiled)
