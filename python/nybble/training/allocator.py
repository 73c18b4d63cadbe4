"""Memory that a training step frees: it stays with the process for the next step, or goes back at once."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: glibc's highest for blocks on its heap; larger ones are mapped, and returned when they are freed.
_LARGEST_ON_HEAP = 32 << 20
_KEPT = 1 << 30
_SMALL = 1 << 20
#: Below it a block is shorter than what mapping it wastes at its ends.
LEAST = 1 << 16
_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@contextmanager
def kept_heap() -> Iterator[None]:
    """Within it, glibc's malloc returns at most what exceeds 1 GiB at the top of its heap to the system.

    By itself it returns what is freed there from some megabytes on, and a step takes it back page by page: 400 MB in
    each step of a model of 170 M parameters, 4 to 6% of its time. The price is memory that lies free between blocks at
    the peak: nothing to 5% more of the process's there. When the context ends, what is free is returned. Elsewhere than
    on glibc, and where the environment configures malloc (MALLOC_TRIM_THRESHOLD_, GLIBC_TUNABLES, ...), it does
    nothing. May be nested.
    """
    libc = None if any(name in os.environ for name in _USERS) else _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_ON_HEAP)
    libc.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        # What malloc comes to by itself in a process that frees large blocks; what it was cannot be asked for.
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_ON_HEAP)
        libc.malloc_trim(0)


@contextmanager
def returned_heap(smallest: int = _SMALL) -> Iterator[None]:
    """Within it, glibc's malloc returns every block of `smallest` bytes or more to the system when it is freed.

    For weights that are gathered before a layer and freed after it: on the heap they leave holes, which the next
    layer's do not fill exactly, and a process held 460 MB of a model of 170 M parameters where it has 60 MB of its own.
    With `LEAST` next to nothing is held beside the tensors that live: a step of that model with checkpointing holds 274
    MB, on the heap 478. The price is that each block comes in new pages: with `LEAST` 1.1 to 1.5 times a step's CPU
    time at hidden size 1,024. Elsewhere, and with a malloc that the environment configures, it does nothing.
    """
    libc = None if any(name in os.environ for name in _USERS) else _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, smallest)
    libc.mallopt(_TRIM_THRESHOLD, _SMALL)
    libc.malloc_trim(0)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_ON_HEAP)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_ON_HEAP)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
