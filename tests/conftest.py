"""What all tests share: one run per instruction set of the machine, thread counts, Hypothesis profiles."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

# Before torch loads MKL: else bits of an fp32 product depend, on some CPUs, on where its operands lie in memory, and
# what two products of the same rows have in common could not be tested.
os.environ.setdefault("MKL_CBWR", "AUTO")

import pytest
import torch
from hypothesis import HealthCheck, settings

from nybble import _core, reference
from nybble.backends import cpu

# A shell starts what runs in its background deaf to Ctrl-C, which tests press in the processes that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Deadlines measure the machine, not the code. The isa fixture is set once per test, not per example, which is meant.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("default", max_examples=80, **_COMMON)
settings.register_profile("ci", max_examples=80, derandomize=True, print_blob=True, **_COMMON)
settings.register_profile("thorough", max_examples=800, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))

# A forced instruction set is the only one that tests then run under.
ISAS = [_core.active_isa()] if os.environ.get("NYBBLE_FORCE_ISA") else _core.isas()
_covered: set[str] = set()


def pytest_report_header() -> str:
    """Which instruction sets the parametrized tests run under."""
    return f"nybble ISAs: {', '.join(ISAS)} (default: {_core.active_isa()})"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which of them a test has really run under."""
    if _covered:
        covered = ", ".join(name for name in ISAS if name in _covered)
        terminalreporter.write_line(f"nybble ISAs covered: {covered}; present: {', '.join(ISAS)}")


@contextmanager
def _activated(name: str) -> Iterator[str]:
    previous = _core.set_active_isa(name)
    try:
        assert _core.active_isa() == name
        _covered.add(name)
        yield name
    finally:
        _core.set_active_isa(previous)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once under every instruction set of this machine; the value is its name."""
    with _activated(request.param) as name:
        yield name


@pytest.fixture(params=["reference", *ISAS])
def codec(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Runs the test for the specification and for the compiled backend under every ISA: modules of one signature."""
    if request.param == "reference":
        yield reference
        return
    with _activated(request.param):
        yield cpu


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A function that sets torch's number of threads; the number before is restored after the test."""
    before = torch.get_num_threads()
    try:
        yield torch.set_num_threads
    finally:
        torch.set_num_threads(before)
