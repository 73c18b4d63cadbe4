"""The counters: figures that can be had by hand, and the results of the kernels that do not count."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from problems import make
from shim.metal import counts

from nybble import QuantConfig, QuantTensor

PLAIN = QuantConfig("nf4", block_size=64, double_quant=False)


@pytest.fixture
def counting(mps: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    counts.launches.clear()
    monkeypatch.setattr(mps, "compile_shader", counts.compile_shader)
    yield mps


def test_dequantize_reads_and_writes_all_once(counting: ModuleType) -> None:
    rows, cols = 48, 256
    weight = QuantTensor.quantize(torch.randn(rows, cols), PLAIN).packed_weight()
    counting.dequantize(weight, torch.float16)
    (found,) = counts.launches
    elements, groups = rows * cols, rows * cols // (8 * 256)
    assert found.reads[0] == (elements // 2,) * 3
    assert found.reads[1] == (4 * elements // 8, 4 * elements // 64, 4 * elements // 64)  # by each thread; once
    assert found.reads[5] == (groups * 64, groups * 64, 64)
    assert found.writes == {6: (2 * elements,) * 3}
    assert (found.lookups, found.scalar, found.matrix) == (elements, elements, 0)
    assert found.shared_written == groups * 64


@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_few_rows_read_the_weight_once(counting: ModuleType, m: int) -> None:
    rows, cols = 32, 1024
    problem = make(rows, cols, m, "nf4", 64, nested=False, dtype=torch.float16)
    counting.linear(problem.x, problem.packed, None, None, None)
    (found,) = counts.launches
    groups, elements = rows // 8, rows * cols
    runs = elements // {1: 32, 2: 16, 4: 8, 8: 8}[m]
    assert found.reads[1] == (elements // 2,) * 3
    assert found.reads[2] == (4 * runs, 4 * elements // 64, 4 * elements // 64)
    assert found.reads[0] == (2 * groups * 2 * m * cols, groups * 2 * m * cols, 2 * m * cols)  # by both simdgroups
    assert found.writes == {10: (2 * m * rows,) * 3}
    assert found.lookups == elements
    # A multiply-add for each weight and row, a scale for each run and row, and the sum over lanes.
    assert found.scalar == m * (elements + runs + 5 * 32 * rows)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
@pytest.mark.parametrize("m", [32, 128])
def test_tiles_multiply_once_and_decode_once_a_tile(counting: ModuleType, m: int, grad: bool) -> None:
    rows, cols = 128, 192
    problem = make(rows, cols, m, "nf4", 64, nested=False, dtype=torch.float16, grad=grad)
    if grad:
        counting.grad_input(problem.x, problem.packed, None, None)
    else:
        counting.linear(problem.x, problem.packed, None, None, None)
    (found,) = counts.launches
    high, wide = m // min(m, 64), (cols if grad else rows) // 64
    assert found.matrix == m * rows * cols
    assert found.lookups == high * rows * cols
    assert found.scalar == found.lookups + m * (cols if grad else rows)  # a scale each, and the bias, which may be 0
    assert found.reads[1] == (high * rows * cols // 2, high * rows * cols // 2, rows * cols // 2)
    contraction = rows if grad else cols
    assert found.reads[0] == (wide * 2 * m * contraction, wide * 2 * m * contraction, 2 * m * contraction)


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize(("m", "grad"), [(3, False), (20, False), (20, True)])
def test_results_are_those_of_the_kernels_that_do_not_count(
    mps: ModuleType, monkeypatch: pytest.MonkeyPatch, m: int, grad: bool, format: str
) -> None:
    problem = make(75, 131, m, format, 32, dtype=torch.float16, rank=9, grad=grad)
    arguments = (problem.side, problem.side_weight)
    results = []
    for compiler in (mps.compile_shader, counts.compile_shader):
        monkeypatch.setattr(mps, "compile_shader", compiler)
        mps._library.cache_clear()
        mps._kernel.cache_clear()
        call = mps.grad_input if grad else lambda x, w, *rest: mps.linear(x, w, None, *rest)
        results.append(call(problem.x, problem.packed, *arguments))
    assert torch.equal(*results)
