"""Finished tasks on their way into the journal: their files are synced first, and no task waits for the disk."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from .shard import Shard

# Finished tasks are recorded together, since each record waits for the disk: at most this much work is done twice.
SYNC_SECONDS = 1.0


class Records(Protocol):
    """Where records go: a `Journal`, or another process that has it."""

    records: list[dict[str, Any]]

    def append(self, records: list[dict[str, Any]]) -> None: ...


class Recorder:
    """A thread of its own that syncs the files of finished tasks and then records them."""

    def __init__(self, journal: Records) -> None:
        self._journal = journal
        self._waiting: list[tuple[dict[str, Any], Shard]] = []
        self._changed = threading.Condition()
        self._ending = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="nybble-journal", daemon=True)
        self._thread.start()

    def add(self, record: dict[str, Any], shard: Shard) -> None:
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
