"""Kernel tests run on one thread unless they ask for more."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    # The examples are small: on a busy machine the threads of the float64 products mostly wait for each other.
    threads(1)
