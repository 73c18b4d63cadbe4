"""What the machine can do at most, as contestants: loops that only read and loops that only multiply and add.

`ceilings.cpp` is compiled with the system's C++ compiler into the results folder when it has changed. Without a
compiler, or on a machine for which it has no loop, there are fewer ceilings or none, and `note` says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch  # loads the OpenMP runtime, which the loops share
from harness import Call, copies_for

SOURCE = Path(__file__).with_name("ceilings.cpp")
RESULTS = Path(__file__).with_name("results")

#: The plain loop: one stream a thread, ordinary pages. The others: several streams a thread, huge pages.
PLAIN = "read loop, 1 stream"
STREAMS = (2, 4, 8)
#: Operations of one call of a peak loop, about: 2 to 20 ms.
PEAK_OPERATIONS = {"amx": 20e9, "avx512": 1e9, "avx2": 1e9}
#: Which loop bounds a kernel, by what it multiplies and the active ISA.
PEAKS = {
    "bf16": {"amx": "bf16 amx", "avx512bf16": "bf16 avx512", "avx512": "fp32 avx512", "avx2": "fp32 avx2"},
    "fp32": {"amx": "fp32 avx512", "avx512bf16": "fp32 avx512", "avx512": "fp32 avx512", "avx2": "fp32 avx2"},
    "int8": {"amx": "int8 amx", "avx512bf16": "int8 avx512", "avx512": "int8 avx512"},
}


@cache
def library() -> ctypes.CDLL | str:
    """The compiled loops, or why there are none."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler found (c++, g++, clang++ or CXX)"
    target = RESULTS / f"ceilings-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not target.exists():
        RESULTS.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", str(SOURCE), "-o", str(partial)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            return f"{compiler} failed: {built.stderr.strip().splitlines()[-1:]}"
        partial.rename(target)
    loops = ctypes.CDLL(str(target))
    loops.read_loop.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    loops.read_loop.restype = ctypes.c_uint64
    loops.peak_name.restype = ctypes.c_char_p
    loops.peak_supported.restype = ctypes.c_bool
    loops.peak_operations.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int]
    loops.peak_operations.restype = ctypes.c_double
    loops.peak_loop.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int]
    return loops


def note() -> str | None:
    """Why there are no ceilings, or None."""
    loops = library()
    return f"no ceilings: {loops}" if isinstance(loops, str) else None


def _pages(size: int, huge: bool) -> tuple[mmap.mmap, int]:
    """Anonymous memory that has been written to, and its address."""
    pages = mmap.mmap(-1, size)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    ctypes.memset(address, 1, size)
    return pages, address


def read_loops(weight_bytes: int, rotation: int) -> dict[str, Call]:
    """Contestants that read `weight_bytes` a call out of `rotation` bytes, on torch's number of threads."""
    loops = library()
    if isinstance(loops, str):
        return {}
    step = -(-weight_bytes // 4096) * 4096
    count = copies_for(step, rotation)

    def reader(memory: tuple[mmap.mmap, int], streams: int) -> Call:
        def call(turn: int) -> object:
            return loops.read_loop(memory[1] + turn % count * step, weight_bytes, streams, torch.get_num_threads())

        return call

    # Memory of its own for each: what one loop has read must not wait in the cache for the next.
    several = {f"read loop, {streams} streams": reader(_pages(step * count, True), streams) for streams in STREAMS}
    return {PLAIN: reader(_pages(step * count, False), 1), **several}


def peak_loop(multiply: str, isa: str) -> tuple[str, float, Call] | None:
    """Name, operations a call, and the contestant that multiplies `multiply` at most with this ISA."""
    loops = library()
    wanted = PEAKS[multiply].get(isa)
    if isinstance(loops, str) or wanted is None:
        return None
    index = 0
    while (name := loops.peak_name(index)) is not None and name.decode() != wanted:
        index += 1
    if name is None or not loops.peak_supported(index):
        return None
    threads = torch.get_num_threads()
    rounds = int(PEAK_OPERATIONS[wanted.split()[1]] / loops.peak_operations(index, 1, threads))
    run: Callable[[int, int, int], None] = loops.peak_loop

    def call(turn: int) -> object:
        return run(index, rounds, threads)

    return f"peak {wanted}", loops.peak_operations(index, rounds, threads), call
