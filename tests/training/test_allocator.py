"""A run keeps what it frees for its next step, and leaves the process as it was."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from nybble.training import allocator
from nybble.training.mode import frozen_garbage

FAULTS = """
import ctypes, resource, sys, torch
from contextlib import nullcontext
from nybble.training.allocator import kept_heap

# Blocks are mapped as in a fresh process, whatever the imports have freed: M_MMAP_THRESHOLD.
ctypes.CDLL(None).mallopt(-3, 128 << 10)

def step():
    blocks = [torch.ones(3 << 18) for _ in range(30)]  # 3 MiB each
    del blocks

with kept_heap() if sys.argv[1] == "kept" else nullcontext():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
print(resident)
"""


def faults(how: str, **environment: str) -> tuple[int, int]:
    """Page faults of ten steps, and the bytes that are resident after them."""
    command = [sys.executable, "-c", FAULTS, how]
    result = subprocess.run(command, env={"PATH": "", **environment}, capture_output=True, text=True, check=True)
    first, second = result.stdout.split()
    return int(first), int(second)


@pytest.mark.skipif(allocator._glibc() is None, reason="this is about glibc's malloc")
def test_steps_take_no_new_pages_and_all_are_returned() -> None:
    pages = 10 * 30 * (3 << 20) // 4096
    kept, resident_kept = faults("kept")
    plain, resident = faults("plain")
    assert kept < pages / 100 < plain
    assert resident_kept <= resident + (16 << 20)


HOLES = """
import resource, sys, torch
from contextlib import nullcontext
from nybble.training.allocator import LEAST, returned_heap

with returned_heap(LEAST) if sys.argv[1] == "returned" else nullcontext():
    torch.ones(1 << 20).sum()
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    before = resident()
    blocks = [torch.ones(1 << 18) for _ in range(200)]  # 1 MiB each
    del blocks[::2]
    print(resident() - before)
"""


@pytest.mark.skipif(allocator._glibc() is None, reason="this is about glibc's malloc")
def test_a_returned_heap_has_no_holes() -> None:
    command = [sys.executable, "-c", HOLES, "returned"]
    result = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 110 << 20  # of 200 MiB that there were


@pytest.mark.skipif(allocator._glibc() is None, reason="this is about glibc's malloc")
def test_a_user_who_configures_malloc_is_left_alone() -> None:
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="131072")[0] > 10 * faults("kept")[0]


def test_only_what_was_frozen_here_is_unfrozen() -> None:
    with frozen_garbage():
        assert gc.get_freeze_count() > 0
        with frozen_garbage():
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        with frozen_garbage():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
