"""Side by side in one process: interleaved turns, rotated weights, medians.

A contestant is a function of a rotation index; another index means another copy of its weight. The copies of each
contestant fill the same number of bytes, and the contestants take turns, so that by the time a copy is used again the
others have passed through the caches; a noisy neighbour or a changing clock hits all of them alike.

A turn begins when every other thread of the process sleeps: torch, onnxruntime and OpenVINO have worker pools of their
own that spin for milliseconds after a call, on the cores that the next contestant needs. Then comes one call that is
not timed, which wakes the contestant's own pool as a model's previous layer would have.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import nybble

Call = Callable[[int], object]

#: A call shorter than this is timed several times a turn, after one that is not timed.
SHORT_SECONDS = 4e-3
CALLS_A_TURN = 3


@dataclass(frozen=True)
class Timing:
    """Median and 10th percentile of one contestant, in seconds a call."""

    median: float
    low: float
    calls: int

    def divided(self, repeats: int) -> Timing:
        """The same for one of `repeats` calls that were timed together."""
        return Timing(self.median / repeats, self.low / repeats, self.calls)


def last_level_cache() -> int:
    """Bytes of the largest cache that the operating system tells of, 0 if it tells of none."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size.rstrip("KMG")) * units.get(size[-1:], 1) for size in sizes), default=0)


def default_rotation() -> int:
    """Bytes of all copies of one weight: half of the last-level cache, at least 128 MB.

    Four contestants then pass through twice that cache between two uses of a copy.
    """
    return max(128 << 20, last_level_cache() // 2)


def copies_for(weight_bytes: int, rotation: int) -> int:
    """How many copies of a weight fill `rotation` bytes; at least 5, as many as a turn uses and one more."""
    return max(CALLS_A_TURN + 2, -(-rotation // max(1, weight_bytes)))


def machine() -> dict[str, object]:
    """What the timings depend on beside the code."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isas": nybble.isas(),
        "active": nybble.active_isa(),
        "last_level_cache": last_level_cache(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "nybble": nybble.__version__,
    }


def machine_line() -> str:
    """`machine()` for a reader."""
    m = machine()
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, last-level cache {last_level_cache() >> 20} MB, "
        f"isas {' '.join(nybble.isas())}, active {m['active']}, torch {m['torch']}, load {m['load']}"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def settle(limit: float = 0.05) -> None:
    """Returns when no other thread of this process runs, or after `limit` seconds."""
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        time.sleep(limit / 10)
        return
    stop = time.perf_counter() + limit
    while time.perf_counter() < stop:
        running = 0
        for task in os.listdir(tasks):
            try:
                running += (tasks / task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
            except OSError:  # the thread has ended
                continue
        if running <= 1:
            return
        time.sleep(2e-4)


def race(contestants: dict[str, Call], seconds: float = 1.0, least: int = 5) -> dict[str, Timing]:
    """Runs all contestants in turn for about `seconds` each on average, at least `least` turns each."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    short = {}
    for name, call in contestants.items():
        call(0)
        start = time.perf_counter()
        call(1)
        short[name] = time.perf_counter() - start < SHORT_SECONDS
    gc.collect()
    gc.disable()
    try:
        stop = time.perf_counter() + seconds * len(contestants)
        turn = 0
        while turn < least or time.perf_counter() < stop:
            for name, call in contestants.items():
                settle()
                index = turn * (CALLS_A_TURN + 1)
                if short[name]:
                    call(index)
                for step in range(CALLS_A_TURN if short[name] else 1):
                    start = time.perf_counter()
                    call(index + 1 + step)
                    samples[name].append(time.perf_counter() - start)
            turn += 1
    finally:
        gc.enable()
    return {
        name: Timing(statistics.median(times), statistics.quantiles(times, n=10)[0], len(times))
        for name, times in samples.items()
    }
