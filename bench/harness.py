"""Side by side in one process: interleaved calls, rotated weights, medians, ratios.

A contestant is a function of a rotation index; it touches another copy of the weight for another index. The copies of
each contestant fill the same number of bytes, more than a core's own caches; a server's shared last-level cache can be
larger still, so the first line of a bench prints its size. Contestants take turns call by call, so a noisy neighbour or
a changing clock hits all of them alike.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

#: Bytes that the copies of one weight fill together.
ROTATION_BYTES = 128 << 20


@dataclass(frozen=True)
class Timing:
    """Median and 10th percentile of one contestant, in seconds a call."""

    name: str
    median: float
    low: float
    calls: int


def copies_for(weight_bytes: int) -> int:
    """How many copies of a weight to rotate through."""
    return max(2, -(-ROTATION_BYTES // max(1, weight_bytes)))


def last_level_cache() -> str:
    """Size of the largest cache that the operating system tells of."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, key=lambda size: int(size.rstrip("KMG")), default="unknown")


def race(contestants: dict[str, Callable[[int], object]], seconds: float = 1.5, least: int = 5) -> dict[str, Timing]:
    """Runs all contestants in turn for about `seconds` each on average, at least `least` rounds after a warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call(0)
    gc.disable()
    try:
        stop = time.perf_counter() + seconds * len(contestants)
        turn = 0
        while turn < least or time.perf_counter() < stop:
            for name, call in contestants.items():
                start = time.perf_counter()
                call(turn)
                samples[name].append(time.perf_counter() - start)
            turn += 1
    finally:
        gc.enable()
    return {
        name: Timing(name, statistics.median(times), statistics.quantiles(times, n=10)[0], len(times))
        for name, times in samples.items()
    }


def append_json(path: Path, row: dict[str, object]) -> None:
    """One JSON line more, so that runs can be compared later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def as_row(case: dict[str, object], timings: dict[str, Timing]) -> dict[str, object]:
    """A case and its timings as one JSON-able row."""
    return {**case, "timings": {name: asdict(timing) for name, timing in timings.items()}}
