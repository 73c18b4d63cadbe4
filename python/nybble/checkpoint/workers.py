"""The threads of a process that do tasks, and the ceiling on memory that they share."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from ..errors import CheckpointError, LayoutError, NonFiniteError
from .recorder import Recorder
from .shard import Shard
from .task import Output, StoppedError, Task, Tick

# A piece that a worker holds at once. Larger ones are slower: their pages are new in every weight, where a weight of
# several pieces uses them again (measured, 2 workers: 32 MB read into new pages 16 ms, into used ones 5 ms).
_MAX_ROOM = 16 << 20
# What threads and files take beside the buffers that are counted; a fifth more is left to the allocator (measured under
# ceilings of 80 to 512 MB: up to 123 of 128 MB with a tenth).
_RESERVE = 24 << 20
# A task's errors that lie in the data: the same call would only meet them again.
_IN_THE_DATA = (NonFiniteError, LayoutError, CheckpointError)

Record = dict[str, Any]


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


class Workers:
    """The threads of one process.

    Attributes:
        resumed: tasks that an earlier run had done. spoiled: whether a task met an error that lies in the data.
    """

    def __init__(self, workers: int | None, max_memory: int | None, sharing: int = 1) -> None:
        """`max_memory`: bytes that all tasks at work may hold together, in all of the `sharing` processes."""
        self._threads = max(1, torch.get_num_threads())
        self._workers = self._threads if workers is None else workers
        self._memory, self._sharing = max_memory, sharing
        self.resumed, self.spoiled = 0, False
        self._kept: dict[str, tuple[Task, Record]] = {}
        self._stop, self._stopped = threading.Event(), False
        self._tick_lock = threading.Lock()

    def check_memory(self, tasks: Sequence[Task]) -> None:
        """Divide the memory allowed.

        Raises:
            CheckpointError: a task needs more than all of it.
        """
        if self._memory is None:
            most = max((task.fixed + max(task.widest, _MAX_ROOM) for task in tasks), default=0)
            self._budget, self._share = Budget(most + self._workers * _MAX_ROOM), _MAX_ROOM
            return
        total = int(self._memory / self._sharing * 0.8) - _RESERVE
        for task in tasks:
            need = task.fixed + task.widest
            if need > total:
                least = (int((need + _RESERVE) / 0.8) + 1) * self._sharing
                among = "" if self._sharing == 1 else f" for {self._sharing} processes"
                raise CheckpointError(
                    f"max_memory: {self._memory:,} bytes{among} are too few: {task.name!r} needs at least {least:,}"
                )
        self._budget, self._share = Budget(total), total // self._workers

    def run(
        self,
        tasks: Sequence[Task],
        place: Mapping[str, Shard],
        done: Mapping[str, Record],
        recorder: Recorder,
        tick: Tick,
    ) -> dict[str, Record]:
        """Every task's record: of `done` where the file still holds what that tells of, else of work done now.

        Raises:
            Whatever a task raises; the others stop.
            StoppedError: `stop` was called.
        """
        self._place, self._recorder, self._tick = place, recorder, tick
        todo = {}
        try:
            with ThreadPoolExecutor(self._workers, initializer=self._use_threads) as pool:
                for task in tasks:
                    todo[pool.submit(self._one, task, done.get(task.name))] = task
                try:
                    wait(todo, return_when=FIRST_EXCEPTION)
                finally:
                    self._stop.set()
                    for future in todo:
                        future.cancel()
            _raise_first(todo)
            if self._stopped:
                raise StoppedError
        finally:
            torch.set_num_threads(self._threads)
        return {task.name: future.result() for future, task in todo.items()}

    def stop(self) -> None:
        """Let `run` end soon, for something outside of it."""
        self._stopped = True
        self._stop.set()

    def _use_threads(self) -> None:
        # Of this thread alone: OpenMP keeps the number by thread.
        torch.set_num_threads(max(1, self._threads // self._workers))

    def _one(self, task: Task, earlier: Record | None) -> Record:
        shard = self._place[task.name]
        advanced = 0

        def advance(count: int) -> None:
            nonlocal advanced
            if self._stop.is_set():
                raise StoppedError
            advanced += count
            if count:
                with self._tick_lock:
                    self._tick(count, task.name)

        advance(0)
        if earlier is not None and _is_intact(task, shard, earlier):
            with self._tick_lock:
                self.resumed += 1
                self._kept[task.name] = (task, earlier)
            advance(task.nbytes)
            return earlier
        room = min(_MAX_ROOM, max(task.widest, self._share - task.fixed))
        with self._budget.hold(task.fixed + room):
            output = Output(shard, task, room, advance)
            with self._judged(task):
                result = task.run(output)
                output.check_complete()
            if self._memory is not None:
                give_back()
        record = {"task": task.name, "result": result, "texts": output.texts, "crc": output.checksums}
        self._recorder.add(record, shard)
        advance(task.nbytes - advanced)
        return record

    @contextlib.contextmanager
    def _judged(self, task: Task) -> Iterator[None]:
        """Notice errors that lie in the data; torch's error for a lack of memory becomes Python's."""
        try:
            yield
        except _IN_THE_DATA:
            self.spoiled = True
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


def _is_intact(task: Task, shard: Shard, earlier: Record) -> bool:
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


def _raise_first(todo: Iterable[Future[Record]]) -> None:
    """The error of the task that failed, if one did; the others stopped for it."""
    errors = [error for future in todo if not future.cancelled() and (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, StoppedError):
            raise error


def give_back() -> None:
    """Let the C library return what it keeps of freed memory: it is no one's, but it counts against the ceiling."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
