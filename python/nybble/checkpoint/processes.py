"""How several processes come to do one job: started here for it, or started by torchrun."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal, TypeVar

import torch

from .team import Leader, LinkLostError, LostProcessError, Member, Message, ReportedError, Team

Processes = int | Literal["torchrun"]
T = TypeVar("T")

# After so long a silence a process, or the network to it, counts as gone.
_SILENCE = timedelta(minutes=5)
# Runs of this program; every process of torchrun makes the same ones.
_runs = itertools.count()
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_processes(processes: Processes) -> None:
    """Raises ValueError unless so many processes can be had."""
    if processes == "torchrun":
        missing = [name for name in _ENVIRONMENT if name not in os.environ]
        if missing:
            raise ValueError(f"processes: 'torchrun' needs {', '.join(missing)} in the environment; torchrun sets it")
    elif isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise ValueError(f"processes: a number of processes, 1 or more, or 'torchrun' is needed, not {processes!r}")


def together(function: Callable[..., T], processes: Processes, **arguments: Any) -> T:
    """`function(team, **arguments)` in every one of `processes`; the result of this one's.

    Processes that are started here import `function` and call it with the same arguments, but for `progress`, which is
    this process's.

    Raises:
        Whatever goes wrong in any of the processes, here if this is the first one.
        ReportedError: it is not, and the first one raises it.
        LostProcessError: one of the processes has ended.
    """
    check_processes(processes)
    if processes == "torchrun":
        if int(os.environ["WORLD_SIZE"]) == 1:
            return function(None, **arguments)
        with _joined() as team:
            return take_part(function, team, arguments)
    if processes == 1:
        return function(None, **arguments)
    with _started(int(processes), function, {**arguments, "progress": None}) as team:
        return take_part(function, team, arguments)


def take_part(function: Callable[..., T], team: Team, arguments: dict[str, Any]) -> T:
    """This process's call; see `together`."""
    if isinstance(team, Leader):
        with team:
            return function(team, **arguments)
    try:
        with team:
            return function(team, **{**arguments, "progress": None})
    except LostProcessError as error:
        if error.rank == 0:
            raise
        raise ReportedError(f"rank {team.rank} of {team.size} processes stopped; rank 0 says why") from error
    except Exception as error:
        raise ReportedError(f"rank {team.rank} of {team.size} processes stopped; rank 0 says why") from error


# ---- started here ----------------------------------------------------------------------------------------------------


class PipeLink:
    """To a process of this machine; `process` is None in that process itself, whose pipe leads to its parent."""

    def __init__(self, connection: Connection, process: BaseProcess | None = None) -> None:
        self._connection, self._process = connection, process

    def send(self, message: Message) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise LinkLostError(self._fate()) from error

    def receive(self) -> Message:
        try:
            message: Message = self._connection.recv()
        except (EOFError, OSError) as error:
            raise LinkLostError(self._fate()) from error
        return message

    def close(self) -> None:
        """Let the other end know that nothing will come."""
        self._connection.close()

    def _fate(self) -> str:
        if self._process is None:
            return "its pipe is closed"
        self._process.join(5)
        code = self._process.exitcode
        if code is None:
            return "its pipe is closed"
        return f"exit status {code}" if code >= 0 else f"killed by {_signal_name(-code)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextlib.contextmanager
def _started(size: int, function: Callable[..., Any], arguments: dict[str, Any]) -> Iterator[Leader]:
    """This process and `size` - 1 new ones, which share the threads that this one has had."""
    threads = torch.get_num_threads()
    share = max(1, threads // size)
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks in whatever state they are
    children: dict[int, multiprocessing.context.SpawnProcess] = {}
    pipes: dict[int, PipeLink] = {}
    team: Leader | None = None
    try:
        for rank in range(1, size):
            here, there = context.Pipe()
            child = context.Process(
                target=_child, args=(there, rank, size, share, function, arguments), name=f"nybble-{rank}", daemon=True
            )
            children[rank], pipes[rank] = child, PipeLink(here, child)
            with _deaf():  # a Ctrl-C meanwhile is raised at its end
                child.start()
            there.close()
        torch.set_num_threads(share)
        with _remembered_interruption() as interrupted:
            # One that still imports would go on with it for seconds.
            team = Leader(pipes, size, lambda rank: children[rank].kill(), interrupted)
            yield team
    except BaseException:
        if team is None or not team.has_stopped:  # nobody has told them to begin, or that it is over
            for child in children.values():
                if child.pid is not None:
                    child.kill()
        raise
    finally:
        torch.set_num_threads(threads)
        for pipe in pipes.values():
            pipe.close()
        for child in children.values():
            if child.pid is None:  # never started
                continue
            child.join(5)  # it has left, or could not be stopped
            if child.is_alive():
                child.kill()


@contextlib.contextmanager
def _remembered_interruption() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether Ctrl-C has come.

    The KeyboardInterrupt is raised wherever the main thread is, and what is imported there may swallow it: a bare
    `except:`, or compiled code that asks for an attribute.
    """
    came = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal came
        came = True
        signal.default_int_handler(number, frame)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that start within it ignore Ctrl-C, which reaches all of a terminal; the first one stops them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing's own process; its start would end what follows
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; here it only comes later
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(
    connection: Connection, rank: int, size: int, threads: int, function: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where the start from `_deaf` did not see to it
    torch.set_num_threads(threads)
    try:
        take_part(function, Member(PipeLink(connection), rank, size, sharing=size), arguments)
    except (ReportedError, KeyboardInterrupt):  # the first process's, either of them
        sys.exit(1)
    except LostProcessError as error:  # of the first process, which would have said so
        sys.exit(f"error: {error}" if rank == 1 else 1)


# ---- started by torchrun ---------------------------------------------------------------------------------------------


class GlooLink:
    """To a process of the same process group, by torch.distributed."""

    def __init__(self, group: Any, peer: int) -> None:
        self._group, self._peer = group, peer

    def send(self, message: Message) -> None:
        from torch import distributed

        try:
            distributed.send_object_list([message], group=self._group, group_dst=self._peer)
        except RuntimeError as error:
            raise LinkLostError(_how(error)) from error

    def receive(self) -> Message:
        from torch import distributed

        found: list[Any] = [None]
        try:
            distributed.recv_object_list(found, group=self._group, group_src=self._peer)
        except RuntimeError as error:
            raise LinkLostError(_how(error)) from error
        message: Message = found[0]
        return message


def _how(error: RuntimeError) -> str:
    if "timed out" in str(error).lower():
        return f"it has said nothing for {_SILENCE.seconds} seconds"
    return "its connection is closed"


@functools.cache
def _store() -> Any:
    """Where torchrun's processes find each other; one for all runs, whose server a new one might take for its own."""
    from torch import distributed

    store, _, _ = next(distributed.rendezvous("env://", timeout=_SILENCE))
    return store


@contextlib.contextmanager
def _joined() -> Iterator[Team]:
    """All processes of this run of torchrun, of which this is one; a group that there is already is left alone."""
    from torch import distributed

    is_new = not distributed.is_initialized()
    if is_new:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # What an earlier group has left in the store would mislead a new one under the same names.
        store = distributed.PrefixStore(f"nybble/{next(_runs)}", _store())
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_SILENCE)
    group = None if is_new else distributed.new_group(backend="gloo", timeout=_SILENCE)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    team: Team
    if rank == 0:
        team = Leader({peer: GlooLink(group, peer) for peer in range(1, size)}, sharing)
    else:
        team = Member(GlooLink(group, 0), rank, size, sharing)
    try:
        with _last_words(team):
            yield team
    finally:
        if team.is_alone:  # a thread that still waits for a message would meet a group that is gone
            distributed.destroy_process_group(group)


@contextlib.contextmanager
def _last_words(team: Team) -> Iterator[None]:
    """Keep the first process until it has said which of the others failed: torchrun then ends all that are left."""
    if not isinstance(team, Leader) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        for _ in range(20):  # torchrun may know before the connection breaks
            if team.has_failed:
                return
            time.sleep(0.05)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
