"""Ctrl-C between steps, never within one; of several processes, also the signal by which they are told to end."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

#: Seconds in which a second signal is the first once more: a terminal sends Ctrl-C to all processes, and torchrun
#: passes it on to those that it started.
_ECHO = 2.0


class Interrupt:
    """Turns the first Ctrl-C into a flag, so that a step is never cut in half; the second one interrupts at once.

    Signals reach only the main thread; elsewhere the flag simply stays down. `launched`: the process is one of several,
    whose launcher ends them with SIGTERM and passes a Ctrl-C on.
    """

    def __init__(self, launched: bool = False) -> None:
        self.requested = False
        self._launched = launched
        self._signals = (signal.SIGINT, signal.SIGTERM) if launched else (signal.SIGINT,)
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, previous in self._previous.items():
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default if previous is None else previous)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not (self._launched and time.monotonic() - self._since < _ECHO):
            raise KeyboardInterrupt
        if not self.requested:
            self._since = time.monotonic()
        self.requested = True
