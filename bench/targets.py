"""What the CPU kernels are to reach, and what rows of a bench run say about it.

A target is a ratio within one interleaved race; over several shapes the worst one decides.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

Row = dict

PLAIN = "read loop, 1 stream"
INT8_PEERS = ("bitsandbytes int8", "onnxruntime int8", "OpenVINO int8", "OpenVINO int4, int8 activations")


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: the op and its size. than: what it is compared with, in words.
        goal: the ratio to reach: at least, or at most if `at_most`.
        op: rows of this op count. where: facts that a row must have.
        measure: the ratio in a row; None if a contestant is missing there.
    """

    what: str
    than: str
    goal: float
    op: str
    where: dict[str, object]
    measure: Callable[[Row], float | None]
    at_most: bool = False

    def ratios(self, rows: Iterable[Row]) -> dict[str, float]:
        """Of the newest row of each table and column."""
        found = {}
        for row in rows:
            if row["op"] == self.op and all(row.get(key) == value for key, value in self.where.items()):
                ratio = self.measure(row)
                if ratio is not None:
                    found[label(row)] = ratio
        return found

    def worst(self, ratios: dict[str, float]) -> float:
        """The ratio that decides."""
        return max(ratios.values()) if self.at_most else min(ratios.values())

    def reached(self, ratios: dict[str, float]) -> bool:
        """Whether the worst is good enough."""
        return self.worst(ratios) <= self.goal if self.at_most else self.worst(ratios) >= self.goal


def label(row: Row) -> str:
    """Which shape, and which column where there is no shape."""
    return f"{row['n']}x{row['k']}" if "n" in row else str(row["column"])


def median(row: Row, name: str) -> float | None:
    timing = row["timings"].get(name)
    return timing["median"] if timing else None


def faster(*peers: str, ours: str = "nybble") -> Callable[[Row], float | None]:
    """How many times as fast as the fastest contestant whose name begins with one of `peers` (none: any)."""

    def measure(row: Row) -> float | None:
        mine = median(row, ours)
        theirs = [
            timing["median"]
            for name, timing in row["timings"].items()
            if not name.startswith("nybble") and (not peers or name.startswith(peers))
        ]
        return min(theirs) / mine if mine and theirs else None

    return measure


def bandwidth(best: bool, ours: str = "nybble") -> Callable[[Row], float | None]:
    """Bytes a second beside the plain read loop's, or beside the fastest loop's."""

    def measure(row: Row) -> float | None:
        mine, rates = median(row, ours), row["read_gbs"]
        if not mine or not rates:
            return None
        return row["bytes"] / mine / 1e9 / (max(rates.values()) if best else rates[PLAIN])

    return measure


def of_peak(row: Row) -> float | None:
    """Operations a second beside the peak loop's."""
    mine, peak = median(row, "nybble"), row["peak_gflops"]
    return row["operations"] / mine / 1e9 / next(iter(peak.values())) if mine and peak else None


def times_as_long(ours: str, base: str) -> Callable[[Row], float | None]:
    """Our time by another contestant's."""

    def measure(row: Row) -> float | None:
        mine, other = median(row, ours), median(row, base)
        return mine / other if mine and other else None

    return measure


def source_rate(row: Row) -> float | None:
    """Bytes of the source, GB/s."""
    mine = median(row, "nybble")
    return row["source_bytes"] / mine / 1e9 if mine else None


def forward_targets() -> Iterator[Target]:
    def forward(m: int, than: str, goal: float, measure: Callable[[Row], float | None]) -> Target:
        return Target(f"forward, M = {m}", than, goal, "forward", {"m": m}, measure)

    yield forward(1, "bandwidth of the plain read loop", 1.0, bandwidth(False))
    yield forward(1, "stretch: bandwidth of the best read loop", 0.9, bandwidth(True))
    yield forward(1, "bitsandbytes", 1.3, faster("bitsandbytes"))
    yield forward(1, "the fastest peer", 1.1, faster())
    for m in (4, 8):
        for peer in ("bitsandbytes", "torch", "onnxruntime"):
            yield forward(m, peer, 1.4, faster(peer))
    yield forward(16, "bitsandbytes", 1.6, faster("bitsandbytes"))
    yield forward(64, "torch bf16", 1.1, faster("torch bf16"))
    for m in (256, 1024):
        yield forward(m, "torch bf16", 1.0, faster("torch bf16"))
        yield forward(m, "bitsandbytes", 1.4, faster("bitsandbytes"))
        yield forward(m, "peak loop", 0.85, of_peak)


def training_targets() -> Iterator[Target]:
    for m in (256, 1024):
        yield Target(f"grad_input, M = {m}", "torch bf16", 1.15, "grad_input", {"m": m}, faster("torch bf16"))
    for m in (1, 16, 256, 1024):
        # "The same" is within the 5% that a median of one race scatters.
        where = {"m": m, "what": "forward"}
        measure = times_as_long("nybble train", "nybble eval")
        yield Target(f"forward while training, M = {m}", "time of eval", 1.05, "train", where, measure, True)
    for direction, ours in (("forward", "nybble LoRA"), ("backward", "nybble LoRA, to x, A, B")):
        where = {"m": 256, "what": f"lora {direction}"}
        measure = times_as_long(ours, "nybble")
        yield Target(f"LoRA r = 16 {direction}, M = 256", "time of the plain op", 1.06, "train", where, measure, True)


def other_targets() -> Iterator[Target]:
    for ours in ("nybble W8A8", "nybble W4A8"):
        for m in (16, 256, 1024):
            measure = faster(*INT8_PEERS, ours=ours)
            yield Target(f"{ours.split()[1]}, M = {m}", "the fastest int8 peer", 1.1, "int8", {"m": m}, measure)
    yield Target("fp32, M = 256", "torch fp32", 1.0, "fp32", {"m": 256}, faster("torch fp32"))
    quantize, dequantize = {"what": "quantize"}, {"what": "dequantize"}
    yield Target("quantize NF4, bf16", "bitsandbytes", 40.0, "codec", quantize, faster("bitsandbytes"))
    yield Target("quantize NF4, bf16", "GB/s of the source", 4.0, "codec", quantize, source_rate)
    searched = faster("bitsandbytes", ours='nybble, search="mse"')
    yield Target('quantize NF4, search="mse"', "bitsandbytes", 5.0, "codec", quantize, searched)
    yield Target("dequantize into a buffer", "copy_ that writes as much", 0.8, "codec", dequantize, faster("copy_"))
    overhead = times_as_long("nybble", "nn.Linear")
    yield Target("call overhead, 64 x 64, M = 1", "time of nn.Linear", 1.5, "overhead", {}, overhead, True)
    bf16 = bandwidth(False, "nybble, bf16 activations")
    yield Target("AVX2, M = 1, bf16", "bandwidth of the plain read loop", 0.8, "avx2", {"m": 1}, bf16)
    yield Target("AVX2, M = 256, fp32", "torch fp32", 0.9, "avx2", {"m": 256}, faster("torch fp32"))


def targets() -> list[Target]:
    """All lines of the table, in order."""
    return [*forward_targets(), *training_targets(), *other_targets()]


def judged(rows: list[Row]) -> list[tuple[str, str, str, str, str]]:
    """A line a target: what, compared with, target, measured (each shape), reached."""
    lines = []
    for target in targets():
        ratios = target.ratios(rows)
        goal = f"{'<=' if target.at_most else '>='} {target.goal:g}"
        if not ratios:
            lines.append((target.what, target.than, goal, "not measured", "-"))
            continue
        measured = " / ".join(f"{ratio:.2f}" for ratio in ratios.values())
        lines.append((target.what, target.than, goal, measured, "yes" if target.reached(ratios) else "no"))
    return lines


def ceilings_met(rows: list[Row]) -> dict[str, float]:
    """The medians of all ceilings over the run."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        for key, unit in (("read_gbs", "GB/s"), ("peak_gflops", "GFLOP/s")):
            for name, rate in row[key].items():
                rates.setdefault(f"{name}, {unit}", []).append(rate)
    return {name: statistics.median(values) for name, values in rates.items()}
