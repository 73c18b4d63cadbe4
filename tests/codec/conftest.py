"""Codec tests run on one thread unless they ask for more."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    # torch.bucketize, which the reference is made of, splits work of 200 elements: on a busy machine its threads wait
    # for each other for most of the run. The thread counts of the kernels have tests of their own.
    threads(1)
