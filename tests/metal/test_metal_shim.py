"""The shim must see what it is there for: each fault planted into the shipped text must fail, by its own message.

Barriers that are removed are seen by wrong results (poison, or what another step left); the text as it is passes in
every order. A wrong address space does not compile.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from bounds import assert_within_bound, rounds_weight
from problems import make, quantized
from shim.metal import build
from shim.metal.library import ORDERS, LaunchError, Library, Schedule

from nybble import QuantConfig, reference
from nybble.backends import mps as backend
from nybble.formats import codebook, dynamic_map

LIBRARIES = ("dequantize", "linear_small_m", "linear_tiles", "quantize")
# Of each library what one run needs, so that a fault costs a second to compile.
FEWER = {
    "dequantize": "DEQUANTIZE(half)",
    "linear_small_m": "SMALL_M(half, 4)",
    "linear_tiles": "TILES(half, 32)",
    "quantize": "QUANTIZE(half)",
}


def short_text(name: str) -> str:
    """A library with the kernels for half only, and of one size."""
    text = backend.source(name)
    return text[: text.rindex("\n\n", 0, text.rindex("(float)\n"))] + f"\n\n{FEWER[name]}\n"


def replaced(text: str, before: str, after: str, number: int = 0) -> str:
    """The text with one occurrence changed."""
    places = [match.start() for match in re.finditer(re.escape(before), text)]
    assert len(places) > number, f"{before!r} is there {len(places)} times"
    return text[: places[number]] + after + text[places[number] + len(before) :]


def run_dequantize(mps: ModuleType) -> None:
    for format in ("nf4", "int8"):
        weight = quantized(37, 61, QuantConfig(format=format, block_size=32, double_quant=format == "nf4"))
        assert torch.equal(mps.dequantize(weight.packed_weight(), torch.float16), weight.dequantize(torch.float16))
    q, absmax = reference.quantize_8bit(torch.randn(333), dynamic_map(), 32)
    found, wanted = (m.dequantize_8bit(q, absmax, dynamic_map(), 32, torch.float16) for m in (mps, reference))
    assert torch.equal(found, wanted)


def run_quantize(mps: ModuleType) -> None:
    x = (100 * torch.randn(1155)).half()  # 37 blocks, 15 rows: no whole threadgroups
    for found, wanted in (
        (m.quantize_4bit(x, codebook("nf4"), 32) for m in (mps, reference)),
        (m.quantize_8bit(x, dynamic_map(), 64) for m in (mps, reference)),
        (m.quantize_int8(x.reshape(-1, 77)) for m in (mps, reference)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def run_linear(mps: ModuleType, shapes: list[tuple[int, int, int]], directions: tuple[bool, ...]) -> None:
    for (n, k, m), grad, format in itertools.product(shapes, directions, ("nf4", "int8")):
        problem = make(n, k, m, format, 32, dtype=torch.float16, bias=torch.float32, rank=12, grad=grad, seed=n)
        if grad:
            actual = mps.grad_input(problem.x, problem.packed, problem.side, problem.side_weight)
        else:
            actual = mps.linear(problem.x, problem.packed, problem.bias, problem.side, problem.side_weight)
        assert_within_bound(problem, actual, rounds_weight(mps, problem))


RUNS: dict[str, Callable[[ModuleType], None]] = {
    "dequantize": run_dequantize,
    "quantize": run_quantize,
    "linear_small_m": lambda mps: run_linear(mps, [(13, 96, 3), (9, 33, 3)], (False,)),
    "linear_tiles": lambda mps: run_linear(mps, [(70, 80, 20), (69, 33, 20)], (False, True)),
}


@pytest.fixture
def run(mps: ModuleType, schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Runs a text in the place of a library's, in every order."""

    def run(library: str, text: str) -> None:
        monkeypatch.setattr(mps, "source", lambda name: text)
        monkeypatch.setattr(mps, "compile_shader", lambda text: Library(text, "-O0"))  # most of the time is compiling
        mps._library.cache_clear()
        mps._kernel.cache_clear()
        for schedule.order in ORDERS:
            RUNS[library](mps)

    return run


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_text_as_it_is_passes(run: Callable[[str, str], None], library: str) -> None:
    run(library, short_text(library))


BARRIER, SIMD_BARRIER = (
    "threadgroup_barrier(mem_flags::mem_threadgroup);",
    "simdgroup_barrier(mem_flags::mem_threadgroup);",
)


@pytest.mark.parametrize(
    ("library", "barrier", "number"),
    [
        ("dequantize", BARRIER, 0),
        ("linear_small_m", BARRIER, 0),
        *(("linear_tiles", BARRIER, number) for number in range(5)),
        *(("linear_tiles", SIMD_BARRIER, number) for number in range(2)),
        *(("quantize", BARRIER, number) for number in range(2)),
    ],
)
def test_every_barrier_is_needed(run: Callable[[str, str], None], library: str, barrier: str, number: int) -> None:
    text = short_text(library)
    with pytest.raises((AssertionError, LaunchError)):
        run(library, replaced(text, barrier, "", number))


def test_no_barrier_is_forgotten_above() -> None:
    counts = {name: (short_text(name).count(BARRIER), short_text(name).count(SIMD_BARRIER)) for name in LIBRARIES}
    assert counts == {"dequantize": (1, 0), "linear_small_m": (1, 0), "linear_tiles": (5, 2), "quantize": (2, 0)}


@pytest.mark.parametrize(
    ("library", "before", "after", "message"),
    [
        ("dequantize", "first + 8 <= count", "first <= count", "buffer 0|beside buffer 6"),
        ("dequantize", "element < count; ++element", "element <= count; ++element", "buffer 6"),
        ("dequantize", "thread_index < 16", "thread_index < 17", "line .*: index 16 is out of"),
        ("linear_small_m", "min(first_row + r, rows - 1)) * ulong", "first_row + r) * ulong", "buffer 1"),
        ("linear_small_m", "long(min(i, m - 1))", "long(i + 1)", "buffer 0"),
        ("linear_small_m", "< rows && i < m)", "< rows && i <= m)", "buffer 10"),
        ("linear_tiles", "first_m + x_at < m;", "first_m + x_at <= m;", "buffer 0"),
        ("linear_tiles", "row >= rows || column >= cols", "row > rows || column >= cols", "buffer 1|buffer 2"),
        (
            "linear_tiles",
            "if (row < m && column < columns) {\n        const",
            "if (row <= m && column < columns) {\n        const",
            "buffer 10",
        ),
        ("linear_tiles", "k + e < contraction", "k + e <= contraction", "buffer 0"),
        ("linear_tiles", "(BM * x_row + w_rows * w_row)", "(BM * x_row + w_rows * w_row - 64)", "threadgroup array 0"),
        ("linear_tiles", "(simd_m + 8 * i) * x_row + k, x_row", "(simd_m + 8 * i) * x_row + k, x_row - 1", "within"),
        (
            "linear_tiles",
            "simdgroup_store(sums[i][j], mine",
            "if (lane != 7) simdgroup_store(sums[i][j], mine",
            "other matrices",
        ),
        (
            "linear_tiles",
            "for (int k = 0; k < BK; k += 8)",
            "for (int k = int(lane / 31) * 8; k < BK; k += 8)",
            "deadlock|other matrices|where others",
        ),
        ("quantize", "2 * pair + 1 < count", "2 * pair < count", "assert"),
        (
            "quantize",
            "if (first >= ulong(sizes.count)) return;",
            "if (first > ulong(sizes.count) + 64) return;",
            "buffer",
        ),
        ("quantize", "rank += s > midpoints[rank + step - 1]", "rank += s > midpoints[rank + step]", "assert"),
    ],
)
def test_faults_are_seen(run: Callable[[str, str], None], library: str, before: str, after: str, message: str) -> None:
    with pytest.raises((AssertionError, LaunchError), match=message):
        run(library, replaced(short_text(library), before, after))


def test_misaligned_vectors_are_seen(mps: ModuleType) -> None:
    weight = quantized(4, 64, QuantConfig(double_quant=False))
    packed = torch.cat([torch.zeros(2, dtype=torch.uint8), weight.packed.reshape(-1)])[2:]
    kernel = mps._kernel("dequantize", "dequantize_4bit_half")
    out = torch.empty(4, 64, dtype=torch.float16)
    scales = mps._scales(weight.packed_weight(), out)
    with pytest.raises(LaunchError, match="misaligned"):
        kernel(packed, *scales, out, [256, 6, -1], threads=256, group_size=256)


def test_arguments_are_checked(mps: ModuleType) -> None:
    kernel = mps._kernel("dequantize", "dequantize_int8_half")
    q, scale, out = torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2), torch.empty(2, 3, dtype=torch.float16)
    with pytest.raises(LaunchError, match="takes 4 buffers, given 3"):
        kernel(q, scale, out)
    with pytest.raises(LaunchError, match="buffer 3 is 16 bytes, given 8"):
        kernel(q, scale, out, 7)
    with pytest.raises(RuntimeError, match="Unsupported argument type"):
        kernel(q, scale, None, [2, 3])
    with pytest.raises(LaunchError, match="more than 1024"):
        kernel(q, scale, out, [2, 3], threads=4096, group_size=2048)


@pytest.mark.parametrize("space", build.SPACES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_address_spaces_are_right(library: str, space: str) -> None:
    build.check_space(backend.source(library), space)


# What `volatile` cannot tell apart: memory of a thread where another space is meant. What clang lets pass are C casts
# and what a template's type takes in; so both are asked.
needs_clang = pytest.mark.skipif(build.clang() is None, reason="no clang 17 or newer: clang++, or the package ziglang")


@needs_clang
@pytest.mark.parametrize("library", LIBRARIES)
def test_address_spaces_are_right_to_clang(library: str) -> None:
    build.check_spaces(backend.source(library))


@pytest.mark.parametrize(
    ("library", "before", "after"),
    [
        ("dequantize", "inline float code_in(threadgroup const", "inline float code_in(device const"),
        ("dequantize", "inline float code_in(threadgroup const", "inline float code_in(const"),
        ("dequantize", "((device const uint*)packed)[position]", "((const uint*)packed)[position]"),
        ("dequantize", "inline void store_4(device T*", "inline void store_4(threadgroup T*"),
        (
            "dequantize",
            "device const uchar* stored, device const float* nested,",
            "device const uchar* stored, constant float* nested,",
        ),
        ("linear_small_m", "inline float4 load_4(device const", "inline float4 load_4(const"),
        ("linear_tiles", "threadgroup T* w_tile", "device T* w_tile"),
        ("linear_tiles", "threadgroup float* mine", "float* mine"),
        ("quantize", "threadgroup float* midpoints, int count", "float* midpoints, int count"),
    ],
)
def test_wrong_address_spaces_are_seen(library: str, before: str, after: str) -> None:
    text = replaced(short_text(library), before, after)

    def check() -> None:
        for space in build.SPACES:
            build.check_space(text, space)

    with pytest.raises(build.CompileError, match="error: "):
        check()


@needs_clang
def test_memory_of_a_thread_in_another_space_is_seen_by_clang() -> None:
    text = replaced(short_text("linear_small_m"), "thread uint* words", "device uint* words")
    with pytest.raises(build.CompileError, match="error: "):
        build.check_spaces(text)
