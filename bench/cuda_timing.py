"""Timing on a GPU: CUDA graphs that walk through copies of a weight, replayed in turns, medians of event times.

A graph holds one call for each copy; the copies of a contestant fill at least `ROTATION` bytes, four times the largest
L2 cache, so that every call finds its weight in device memory, not in a cache. Contestants take turns, so that a
changing clock hits all of them alike. Nothing between two events is launched by Python.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

ROTATION = 200 << 20
#: Calls in one graph at least: the few microseconds that a graph takes to start are then spread.
LEAST_CALLS = 4


@dataclass
class Contestant:
    """`call(i)` works on copy i of `copies` and returns a tensor.

    Attributes:
        graph: whether it can be captured; False: its calls are launched one by one, in a busy stream.
    """

    call: Callable[[int], torch.Tensor]
    copies: int = 1
    graph: bool = True
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, 10th percentile, and of how many replays."""

    median: float
    low: float
    replays: int

    @property
    def us(self) -> float:
        return self.median * 1e6


def copies_for(weight_bytes: int, rotation: int = ROTATION) -> int:
    """How many copies of a weight fill `rotation` bytes."""
    return max(1, -(-rotation // max(1, weight_bytes)))


class Gpu:
    """The current GPU and its clock."""

    dry = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def name(self) -> str:
        properties = torch.cuda.get_device_properties(self.device)
        return (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, "
            f"{properties.total_memory / 2**30:.0f} GiB, L2 {getattr(properties, 'L2_cache_size', 0) >> 20} MiB, torch "
            f"{torch.__version__}"
        )

    def race(self, contestants: dict[str, Contestant], seconds: float = 0.1, least: int = 9) -> dict[str, Timing]:
        """Replays all in turn, for about `seconds` each on average, at least `least` turns each."""
        runs = prepared(contestants, self._prepare)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run, _ in runs.values():  # the clock rises, the caches fill with the others' weights
            run()
        torch.cuda.synchronize(self.device)
        stop = time.perf_counter() + seconds * len(contestants)
        turn = 0
        while turn < least or time.perf_counter() < stop:
            events = {}
            for name, (run, _) in runs.items():
                events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[name][0].record()
                run()
                events[name][1].record()
            torch.cuda.synchronize(self.device)
            for name, (start, end) in events.items():
                times[name].append(start.elapsed_time(end) / 1e3 / runs[name][1])
            turn += 1
        return {name: summary(values) for name, values in times.items()}

    def _prepare(self, contestant: Contestant) -> tuple[Callable[[], object], int]:
        """What runs all calls once, and how many they are."""
        count = contestant.copies * -(-LEAST_CALLS // contestant.copies)

        def all_calls() -> None:
            for index in range(count):
                contestant.call(index % contestant.copies)

        if not contestant.graph:
            all_calls()
            return all_calls, count
        # On the stream that is captured: what a call keeps for its stream (nybble: its workspace) is then there.
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in range(contestant.copies):
                contestant.call(index)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Not torch.cuda.graph, which collects garbage and empties the allocator's cache each time: 0.1 s.
            with torch.cuda.stream(stream):
                graph.capture_begin()
                try:
                    all_calls()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            contestant.notes.append(f"not captured in a graph: {str(error).splitlines()[0]}")
            torch.cuda.synchronize(self.device)
            return all_calls, count
        return graph.replay, count

    def step(self, run: Callable[[], object], count: int, warm: int = 3) -> Timing:
        """Times `count` calls one by one, after `warm` that are not timed."""
        times = []
        for index in range(warm + count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(self.device)
            if index >= warm:
                times.append(start.elapsed_time(end) / 1e3)
        return summary(times)

    def reset_peak(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]


class Dry(Gpu):
    """A clock that counts calls, on the CPU: every line of a bench runs, the numbers mean nothing."""

    dry = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._tick = itertools.count(1)

    def name(self) -> str:
        return "DRY RUN on the CPU with tiny sizes: the numbers mean nothing"

    def race(self, contestants: dict[str, Contestant], seconds: float = 0.1, least: int = 9) -> dict[str, Timing]:
        def once(contestant: Contestant) -> None:
            for index in range(contestant.copies):
                contestant.call(index)

        return {name: summary([1e-6 * next(self._tick) for _ in range(3)]) for name in prepared(contestants, once)}

    def step(self, run: Callable[[], object], count: int, warm: int = 3) -> Timing:
        run()
        return summary([1e-3 * next(self._tick)])

    def reset_peak(self) -> None:
        pass

    def peak(self) -> int:
        return 1 << 30

    def free(self) -> int:
        return 1 << 40


def prepared(contestants: dict[str, Contestant], prepare: Callable[[Contestant], Any]) -> dict[str, Any]:
    """What `prepare` makes of each; who cannot run gets a note and takes no part."""
    made = {}
    for name, contestant in contestants.items():
        try:
            made[name] = prepare(contestant)
        except RuntimeError as error:
            contestant.notes.append(f"does not run: {str(error).splitlines()[0]}")
    return made


def summary(values: list[float]) -> Timing:
    low = statistics.quantiles(values, n=10)[0] if len(values) > 1 else values[0]
    return Timing(statistics.median(values), low, len(values))


@dataclass(frozen=True)
class Ceilings:
    """What this GPU was seen to do in this run: bytes a second (a copy counts both ways), operations a second."""

    copy: float
    write: float
    read: float
    matmul: float

    def __str__(self) -> str:
        return (
            f"device-to-device copy {self.copy / 1e9:.0f} GB/s (read + written), write {self.write / 1e9:.0f} GB/s, "
            f"read {self.read / 1e9:.0f} GB/s, bf16 matmul 8192^3 {self.matmul / 1e12:.0f} TFLOP/s"
        )


def ceilings(gpu: Gpu, seconds: float = 0.2) -> Ceilings:
    """Measures them on random data."""
    size, n = (1 << 16, 64) if gpu.dry else (1 << 30, 8192)
    source = torch.randn(size // 4, device=gpu.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(n, n, device=gpu.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    calls = {
        "copy": lambda i: target.copy_(source),
        "write": lambda i: target.fill_(1.0),
        "read": lambda i: source.amax(),
        "matmul": lambda i: torch.mm(left, right, out=out),
    }
    timings = gpu.race({name: Contestant(call) for name, call in calls.items()}, seconds)
    return Ceilings(
        2 * size / timings["copy"].median,
        size / timings["write"].median,
        size / timings["read"].median,
        2 * n**3 / timings["matmul"].median,
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned to the right but for the first, no wider than what is in them."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
