"""Runs in forked children that count their steps and die at a chosen one, for the kill campaigns.

A process that has done nothing but imports forks a child a run, so that a run costs no start of Python.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


class Steps:
    """Counts the calls of functions by their kind; number `die_at` of `kind` is the last moment of this process.

    `kind` "any" counts all of them together.
    """

    def __init__(self, kinds: tuple[str, ...], kind: str, die_at: int) -> None:
        self.count = dict.fromkeys(kinds, 0)
        self._kind, self._die_at = kind, die_at

    def before(self, name: str, function: Callable[..., Any], is_write: bool = False) -> Callable[..., Any]:
        """The function with the step before it. `is_write`: its arguments are a file and data."""

        def step(*args: Any, **kwargs: Any) -> Any:
            self.count[name] += 1
            number = sum(self.count.values()) if self._kind == "any" else self.count[name]
            if self._kind in (name, "any") and number == self._die_at:
                if is_write and len(args[1]) > 1:  # half a write is as real as none
                    function(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return step


def in_child(run: Callable[[], None], counted: Callable[[], Steps]) -> tuple[int, dict[str, int]]:
    """(exit status as the shell counts, steps) of `run` in a forked child, once its own children are gone too.

    `counted` lets the steps of that child be counted.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            steps = counted()
            run()
            os.write(writer, json.dumps(steps.count).encode())
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), json.loads(found or "{}")
