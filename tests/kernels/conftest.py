"""Kernel tests run on one thread unless they ask for more; the weight that tests of the operators have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kernels.ops_inputs import WEIGHTS, K, N
from kernels.problems import quantized

from nybble.backends import PackedWeight


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    # The examples are small: on a busy machine the threads of the float64 products mostly wait for each other.
    threads(1)


@pytest.fixture(params=list(WEIGHTS))
def weight(request: pytest.FixtureRequest) -> PackedWeight:
    return quantized(N, K, WEIGHTS[request.param]).packed_weight()
