"""Bytes and operations of Metal's kernels, counted on the host, and the least time that an M4 would need for them.

    python bench/metal_counts.py

No Apple GPU takes part: times are PREDICTIONS, lower bounds from the two figures below, not measurements. Kernels run
in the shim of tests/shim/metal, which counts (counts.py there) at small shapes; figures for 4096 x 4096 follow from
those, since each threadgroup does (a + b * contraction) of everything. That is checked at a third shape, exactly.
Activations are fp16, scales fp32 with blocks of 64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from shim.metal import counts

from nybble import QuantConfig, QuantTensor
from nybble.backends import mps
from nybble.formats import codebook

N = K = 4096
BANDWIDTH = 120e9  # bytes a second
RATE = 2e12  # lanes' operations a second: a multiply-add is one
SOURCES = """\
120 GB/s: Apple's figure for the M4 as the press quotes it (businesstoday.in, 2024-10-30): the most, not what a kernel
gets. 4 TFLOP/s: Apple publishes none; 10 cores of 128 lanes, a multiply-add a cycle, at 1.47 to 1.6 GHz: 3.76 in
hmc-tech.com's list, fp16 as fp32, and 4.1 for fp32 in cputime.net's. So 2e12 operations a second for all kinds
together, since integers take the same lanes (philipturner/metal-benchmarks, of the M1). That simdgroup matrices run at
this rate and no faster is an assumption."""


class Figures(NamedTuple):
    """Exact multiples; bytes are read and written together."""

    asked: Fraction
    by_group: Fraction
    matrix: Fraction
    scalar: Fraction
    lookups: Fraction

    @classmethod
    def of(cls, found: counts.Counts) -> Figures:
        values = found.total("asked"), found.total("by_group"), found.matrix, found.scalar, found.lookups
        return cls(*map(Fraction, values))


class Case(NamedTuple):
    """A kernel: `run` launches it for m rows, so many columns of the result, and a contraction."""

    name: str
    format: str
    m: int
    rows: int  # that a threadgroup makes of the result
    columns: int  # likewise
    step: int  # of the contraction
    run: Callable[[int, int, int], None]
    once: Callable[[int, int, int], int]  # bytes, each read or written once


def weight(rows: int, cols: int, format: str) -> QuantTensor:
    config = QuantConfig(format, block_size=64, double_quant=False)
    return QuantTensor.quantize(torch.randn(rows, cols), config)


def weight_bytes(elements: int, rows: int, format: str) -> int:
    return elements + 4 * rows if format == "int8" else elements // 2 + elements // 64 * 4 + 64


def linear_case(format: str, m: int, grad: bool) -> Case:
    choice = mps.choose(m, grad)
    small = choice.library == "linear_small_m"

    def run(m: int, columns: int, contraction: int) -> None:
        x = torch.randn(m, contraction, dtype=torch.float16)
        if grad:
            mps.grad_input(x, weight(contraction, columns, format).packed_weight(), None, None)
        else:
            mps.linear(x, weight(columns, contraction, format).packed_weight(), None, None, None)

    def once(m: int, columns: int, contraction: int) -> int:
        out_features = contraction if grad else columns
        return 2 * m * (columns + contraction) + weight_bytes(columns * contraction, out_features, format)

    return Case(choice.kernel, format, m, min(m, choice.rows), 8 if small else 64, 1024 if small else 64, run, once)


def codec_cases() -> Iterator[Case]:
    """A row of 2048 elements is a threadgroup's of dequantize, one of 512 (8 blocks) of quantize."""

    def dequantize(_: int, rows: int, cols: int) -> None:
        mps.dequantize(weight(rows, cols, "nf4").packed_weight(), torch.float16)

    def quantize(_: int, rows: int, cols: int) -> None:
        x = torch.randn(rows, cols).half()
        mps.quantize_4bit(torch.where(x == 0, 1.0, x), codebook("nf4"), 64)  # zeros take fewer operations

    def moved(_: int, rows: int, cols: int) -> int:
        return 2 * rows * cols + weight_bytes(rows * cols, rows, "nf4")

    yield Case("dequantize_4bit", "nf4", 1, 1, 1, 2048, dequantize, moved)
    yield Case("quantize_4bit", "nf4", 1, 1, 1, 512, quantize, moved)


def counted(case: Case, m: int, columns: int, contraction: int) -> Figures:
    counts.launches.clear()
    case.run(m, columns, contraction)
    (found,) = counts.launches
    once, wanted = found.total("once"), case.once(m, columns, contraction)
    assert once == wanted, f"{case.name}: {once} bytes are touched, {wanted} were expected"
    return Figures.of(found)


def scaled(case: Case, m: int, columns: int, contraction: int) -> Figures:
    """From two counts at one threadgroup more than one each way; a third must be as they say."""

    def predicted(m: int, columns: int, contraction: int) -> Figures:
        groups = Fraction(m, case.rows) * Fraction(columns, case.columns)
        return Figures(*(groups * (a + b * contraction) for a, b in lines))

    shape, step = (case.rows, 2 * case.columns), case.step
    first, second = counted(case, *shape, step), counted(case, *shape, 2 * step)
    slopes = [Fraction(y - x, 2 * step) for x, y in zip(first, second, strict=True)]
    lines = [(Fraction(x, 2) - slope * step, slope) for x, slope in zip(first, slopes, strict=True)]
    other = (case.m if case.m <= case.rows else 2 * case.rows, 3 * case.columns, 4 * step)
    found = counted(case, *other)
    assert found == predicted(*other), f"{case.name}: not linear: {found} at {other}, not {predicted(*other)}"
    return predicted(m, columns, contraction)


def row(case: Case, figures: Figures, once: int) -> str:
    asked, by_group = float(figures.asked), float(figures.by_group)
    memory, arithmetic = once / BANDWIDTH, float(figures.matrix + figures.scalar) / RATE
    # Tables of quantize are as long as the codebook, so its reads of them are no decoded weights.
    lookups = "-" if case.name.startswith("quantize") else f"{float(figures.lookups) / 1e6:.1f}"
    return (
        f"{case.name:<17}{case.format:<6}{case.m:>4}{once / 1e6:>9.2f}{by_group / 1e6:>10.2f}{by_group / once:>7.2f}"
        f"{asked / 1e6:>10.2f}{asked / once:>7.2f}{float(figures.matrix) / 1e6:>10.1f}"
        f"{float(figures.scalar) / 1e6:>9.1f}{lookups:>9}{1e6 * memory:>9.1f}{1e6 * arithmetic:>9.1f}"
        f"{1e6 * max(memory, arithmetic):>9.1f}  {'memory' if memory > arithmetic else 'arithmetic'}"
    )


def main() -> None:
    mps.compile_shader, mps._missing = counts.compile_shader, lambda: ""  # stand-ins
    torch.manual_seed(0)
    print(f"Weight {N} x {K}; bytes in MB, operations in millions, times in microseconds: PREDICTED lower bounds")
    print(SOURCES)
    print(
        "once: each byte of the tensors once. by group: different bytes of each threadgroup, as if none shared a cache."
        "\nasked: by each lane for itself. Caches are not modelled: what memory sees lies between once and asked.\n"
        "scalar: fp32 operations; lookups: weights decoded, each again for every 32 or 64 rows. Integer instructions\n"
        "(shifts, masks, addresses) are not counted, nor the time of threadgroup memory, barriers and waiting.\n"
    )
    print(
        f"{'kernel':<17}{'':<6}{'M':>4}{'once':>9}{'by group':>10}{'ratio':>7}{'asked':>10}{'ratio':>7}{'matrix':>10}"
        f"{'scalar':>9}{'lookups':>9}{'memory':>9}{'arithm.':>9}{'at least':>9}"
    )
    for case in codec_cases():
        print(row(case, scaled(case, 1, N, K), case.once(1, N, K)), flush=True)
    for format in ("nf4", "int8"):
        for m, grad in ((1, False), (8, False), (32, False), (512, False), (512, True)):
            case = linear_case(format, m, grad)
            print(row(case, scaled(case, m, N, K), case.once(m, N, K)), flush=True)


if __name__ == "__main__":
    main()
