"""A task: the tensors that belong to one weight, and what it writes them to."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .shard import Shard
from .writer import Slot

Tick = Callable[[int, str], None]

# The least piece of a weight that a task works on, unless it says otherwise.
MIN_ROOM = 4 << 20


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
    widest: int = MIN_ROOM


class StoppedError(Exception):
    """Another task failed: this one need not go on."""


class Output:
    """What a running task writes to.

    Attributes:
        room: bytes that the task may hold beyond its `fixed` ones.
    """

    def __init__(self, shard: Shard, task: Task, room: int, advance: Callable[[int], None]) -> None:
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
