"""The shim itself: a kernel with a planted fault fails with a message that says so, and without it passes."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from shim.guarded import guarded

SCHEDULES = ("random", "in order", "reverse")
SEEDS = range(8)


def reversed_by(shim: ModuleType, fault: int) -> bool:
    x = guarded(torch.arange(128, dtype=torch.int32), read_only=True, name="in")
    out = guarded(torch.zeros(128, dtype=torch.int32), name="out")
    shim.run_faulty("reverse", fault, x.data_ptr(), out.data_ptr())
    return torch.equal(out, x.flip(0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sound(shim: ModuleType, schedule: str) -> None:
    shim.schedule(schedule)
    for seed in SEEDS:
        shim.seed(seed)
        assert reversed_by(shim, 0)


def test_missing_syncthreads(shim: ModuleType) -> None:
    assert not all([reversed_by(shim, 1) for seed in SEEDS if shim.seed(seed) is None])


@pytest.mark.parametrize(
    ("fault", "message"),
    [(3, "past its end"), (4, "past the end of in"), (5, "past the end of out")],
)
def test_out_of_bounds(shim: ModuleType, fault: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        reversed_by(shim, fault)


def test_read_past_shared_memory(shim: ModuleType) -> None:
    assert not reversed_by(shim, 2)  # poison
