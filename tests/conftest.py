"""What all tests share: one run per instruction set of the machine, thread counts, Hypothesis profiles."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from nybble import _core

# Deadlines measure the machine, not the code. The isa fixture is set once per test, not per example, which is meant.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("default", max_examples=40, **_COMMON)
settings.register_profile("ci", max_examples=40, derandomize=True, print_blob=True, **_COMMON)
settings.register_profile("thorough", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))

ISAS = _core.isas()
_covered: set[str] = set()


def pytest_report_header() -> str:
    """Which instruction sets the parametrized tests run under."""
    return f"nybble ISAs: {', '.join(ISAS)} (default: {_core.active_isa()})"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which of them a test has really run under."""
    if _covered:
        covered = ", ".join(name for name in ISAS if name in _covered)
        terminalreporter.write_line(f"nybble ISAs covered: {covered}; present: {', '.join(ISAS)}")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once under every instruction set of this machine; the value is its name."""
    previous = _core.set_active_isa(request.param)
    try:
        assert _core.active_isa() == request.param
        _covered.add(request.param)
        yield request.param
    finally:
        _core.set_active_isa(previous)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A function that sets torch's number of threads; the number before is restored after the test."""
    before = torch.get_num_threads()
    try:
        yield torch.set_num_threads
    finally:
        torch.set_num_threads(before)
