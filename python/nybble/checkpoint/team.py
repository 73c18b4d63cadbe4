"""What the processes of one job tell each other: all talk to the first, which alone keeps the journal.

A member speaks and is answered, twice a second at least, so that each side soon learns that the other is gone. A member
says what it is about to do, which all must agree on, and hears what is done already and who makes which file; then it
sends records of finished weights, and how far it is; at last it hears that all is in place. An error of any process
goes to the first one, which stops the others and raises it.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

# A member at work speaks this often; one that waits for something, so that short jobs are short, ten times as often.
_WORKING_SECONDS, _WAITING_SECONDS = 0.5, 0.05
# How long the others may take to stop: a piece of a weight, or a write to a slow disk.
_STOP_SECONDS = 60.0

Message = dict[str, Any]


class LinkLostError(Exception):
    """The process at the other end of a link is gone; says how it is known."""


class LostProcessError(ConnectionError):
    """A process of the job has ended before its work was done.

    Attributes:
        rank: its number. outcome: what became of the work, for the message.
    """

    def __init__(self, rank: int, size: int, where: str, how: str) -> None:
        place = f"{where}, " if where else ""
        super().__init__(f"rank {rank} of {size} processes has ended ({place}{how})")
        self.rank = rank
        self._parts = (rank, size, where, how)
        self.outcome = "nothing was left behind"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._parts, {"outcome": self.outcome}

    def __str__(self) -> str:
        return f"{super().__str__()}; {self.outcome}"


class ReportedError(RuntimeError):
    """Raised in the other processes where the first one raises the error itself, which is also the cause of this."""


class Link(Protocol):
    """Messages to and from another process; both methods raise LinkLostError."""

    def send(self, message: Message) -> None: ...

    def receive(self) -> Message: ...


def _nothing(*args: Any) -> None:
    return


def _portable(error: BaseException) -> BaseException:
    """The error itself where it survives the way to another process, else what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class Leader:
    """The first process's end: one thread listens to each of the others.

    Attributes:
        rank: 0. size: processes of the job. sharing: those of this machine, which share the memory allowed.
        spoiled: whether a member met an error that lies in the data. resumed: tasks that members found done.
    """

    rank = 0

    def __init__(
        self,
        links: Mapping[int, Link],
        sharing: int,
        abandon: Callable[[int], None] = _nothing,
        interrupted: Callable[[], bool] = bool,
    ) -> None:
        """`links`: by rank, 1 and up. `abandon`: called for a process that need not even begin. `interrupted`: whether
        Ctrl-C has come, which calls that wait or check raise as KeyboardInterrupt."""
        self.size, self.sharing = len(links) + 1, sharing
        self.spoiled, self.resumed = False, 0
        self._links, self._abandon, self._interrupted = links, abandon, interrupted
        self._changed = threading.Condition()
        self._where: dict[int, str] = {}
        self._identities: dict[int, Any] = {}
        self._finished: set[int] = set()
        self._gone: set[int] = set()
        self._told: dict[str, Any] = {}
        self._stopped: Message | None = None
        self._error: BaseException | None = None
        self._append: Callable[[list[dict[str, Any]]], None] = _nothing
        self._tick: Callable[[int, str], None] = _nothing
        self._halt: Callable[[], None] = _nothing
        for rank in links:
            threading.Thread(target=self._serve, args=(rank,), name=f"nybble-rank-{rank}", daemon=True).start()

    # ---- what the job calls ------------------------------------------------------------------------------------------

    def identities(self) -> dict[int, Any]:
        """Every member's idea of the work, by rank; raises what went wrong in one meanwhile."""
        self._wait(lambda: len(self._identities) == len(self._links))
        return self._identities

    def where(self, rank: int) -> str:
        """The process and the machine of a member."""
        return self._where.get(rank, "")

    def begin(
        self,
        told: Message,
        append: Callable[[list[dict[str, Any]]], None],
        tick: Callable[[int, str], None],
        halt: Callable[[], None],
    ) -> None:
        """Let the members work.

        Args:
            told: what `Member.begin` returns.
            append, tick: called with what members have finished and how far they are, from any thread.
            halt: called when one has failed.
        """
        with self._changed:
            self._append, self._tick, self._halt = append, tick, halt
            failed = self._error is not None
            self._told["begin"] = told
        if failed:
            halt()

    def wait_finished(self) -> None:
        """Until the members' files are complete; raises what went wrong in one."""
        self._wait(lambda: len(self._finished) == len(self._links))

    def tell(self, what: str, value: Any) -> None:
        """Answer the members that wait for `what`: "records" or "end"."""
        with self._changed:
            self._told[what] = value

    def check(self) -> None:
        """Raises what went wrong in a member, if anything did."""
        self._wait(lambda: True)

    def stop(self, error: BaseException) -> None:
        """Stop the members and wait for them."""
        with self._changed:
            if self._stopped is None:
                self._stopped = {"stop": _portable(error)}
                for rank in self._links.keys() - self._where.keys():
                    self._abandon(rank)
            self._changed.wait_for(lambda: len(self._gone) == len(self._links), _STOP_SECONDS)

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.stop(value or RuntimeError("the job is over"))

    @property
    def has_failed(self) -> bool:
        """Whether something went wrong in a member, or here with its records."""
        return self._error is not None

    @property
    def has_stopped(self) -> bool:
        """Whether `stop` has been called."""
        return self._stopped is not None

    @property
    def is_alone(self) -> bool:
        """Whether all members are gone."""
        return len(self._gone) == len(self._links)

    # ---- the threads -------------------------------------------------------------------------------------------------

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or ready() or self._interrupted())
            if self._interrupted():
                raise KeyboardInterrupt
            if self._error is not None:
                raise self._error

    def _serve(self, rank: int) -> None:
        link = self._links[rank]
        try:
            leaving = False
            while not leaving:
                message = link.receive()
                try:
                    self._take(rank, message)
                except BaseException as error:  # the journal's disk is full, or the caller's progress function fails
                    self._fail(error)
                leaving = message["leaving"]
                if not leaving:
                    link.send(self._answer(message["wants"]))
            if rank not in self._finished:
                self._fail(LostProcessError(rank, self.size, self.where(rank), "before its work was done"))
        except LinkLostError as error:
            self._fail(LostProcessError(rank, self.size, self.where(rank), str(error)))
        except Exception as error:  # no message that this version of the package understands
            self._fail(error)
        finally:
            with self._changed:
                self._gone.add(rank)
                self._changed.notify_all()

    def _take(self, rank: int, message: Message) -> None:
        if "error" in message:
            self._fail(*message["error"])
        if message["records"]:
            self._append(message["records"])
        for name, count in message["ticks"].items():
            self._tick(count, name)
        with self._changed:
            if "where" in message:
                self._where[rank] = message["where"]
            if "identity" in message:
                self._identities[rank] = message["identity"]
            if "finished" in message:
                self.resumed += message["finished"]
                self._finished.add(rank)
            self._changed.notify_all()

    def _answer(self, wanted: str | None) -> Message:
        with self._changed:
            if self._stopped is not None and "end" not in self._told:
                return self._stopped
            return {wanted: self._told[wanted]} if wanted in self._told else {}

    def _fail(self, error: BaseException, spoiled: bool = False) -> None:
        with self._changed:
            if self._error is not None or self._stopped is not None or "end" in self._told:
                return
            self._error, self.spoiled = error, spoiled
            self._changed.notify_all()
            halt = self._halt
        halt()


class Member:
    """The end of every other process, with a thread that talks to the first.

    Attributes:
        rank, size, sharing: see `Leader`. where: the process and the machine.
        records: of the journal, as far as this process knows them.
    """

    def __init__(self, link: Link, rank: int, size: int, sharing: int) -> None:
        self.rank, self.size, self.sharing = rank, size, sharing
        self.records: list[dict[str, Any]] = []
        self._link = link
        self._changed = threading.Condition()
        self._next = self._empty()
        self.where = f"process {os.getpid()} on {socket.gethostname()}"
        self._next["where"] = self.where
        self._urgent = True
        self._got: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._failed = False
        self._halt: Callable[[], None] = _nothing
        self._thread = threading.Thread(target=self._talk, name="nybble-rank-0", daemon=True)
        self._thread.start()

    # ---- what the job calls ------------------------------------------------------------------------------------------

    def begin(self, identity: Any, halt: Callable[[], None]) -> Message:
        """Say what the work is, and wait until it may begin; returns what `Leader.begin` tells.

        Raises:
            Here, as in every other call that waits: what the first process stops for; LostProcessError if it is gone.
        """
        with self._changed:
            self._halt = halt
            self._next["identity"] = identity
        return self._wait("begin")

    def append(self, records: list[dict[str, Any]]) -> None:
        """Hand over records of what is on the disk."""
        with self._changed:
            self._next["records"] += records
            self._hurry()

    def tick(self, count: int, name: str) -> None:
        """Say how far this process is."""
        with self._changed:
            ticks = self._next["ticks"]
            ticks[name] = ticks.get(name, 0) + count

    def finish(self, resumed: int) -> list[dict[str, Any]]:
        """Say that this process's files are complete, and wait for the others'; returns all records."""
        with self._changed:
            self._next["finished"] = resumed
        return self._wait("records")

    def wait_end(self) -> None:
        """Until all is in place."""
        self._wait("end")

    def fail(self, error: BaseException, spoiled: bool = False) -> None:
        """Let the first process know what went wrong here, unless it said so itself."""
        with self._changed:
            if not self._failed and error is not self._error:
                self._next["error"] = (_portable(error), spoiled)
                self._hurry()
            self._failed = True

    def check(self) -> None:
        """Raises what the first process stops for, if it does."""
        with self._changed:
            if self._error is not None:
                raise self._error

    def __enter__(self) -> Member:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if value is not None:
            self.fail(value)
        with self._changed:
            self._next["leaving"] = True
            self._hurry()
        self._thread.join(_STOP_SECONDS)

    @property
    def is_alone(self) -> bool:
        """Whether the talk with the first process is over."""
        return not self._thread.is_alive()

    # ---- the thread --------------------------------------------------------------------------------------------------

    @staticmethod
    def _empty() -> Message:
        return {"records": [], "ticks": {}, "wants": None, "leaving": False}

    def _hurry(self) -> None:
        self._urgent = True
        self._changed.notify_all()

    def _wait(self, what: str) -> Any:
        with self._changed:
            self._next["wants"] = what
            self._hurry()
            self._changed.wait_for(lambda: what in self._got or self._error is not None)
            if self._error is not None:
                raise self._error
            self._next["wants"] = None
            return self._got[what]

    def _talk(self) -> None:
        try:
            while True:
                with self._changed:
                    pause = _WAITING_SECONDS if self._next["wants"] else _WORKING_SECONDS
                    self._changed.wait_for(lambda: self._urgent, pause)
                    message, self._next, self._urgent = self._next, self._empty(), False
                    self._next["wants"] = message["wants"]
                self._link.send(message)
                if message["leaving"]:
                    return
                self._hear(self._link.receive())
        except LinkLostError as error:
            self._lose(str(error))
        except Exception as error:  # no message that this version of the package understands
            self._lose(f"{type(error).__name__}: {error}")

    def _lose(self, how: str) -> None:
        lost = LostProcessError(0, self.size, "", how)
        lost.outcome = "what it had recorded is kept, the same command goes on"
        self._hear({"stop": lost})

    def _hear(self, answer: Message) -> None:
        with self._changed:
            stop = answer.pop("stop", None)
            self._got.update(answer)
            self._changed.notify_all()
            if stop is None or self._error is not None:
                return
            self._error = stop
        self._halt()


Team = Leader | Member
