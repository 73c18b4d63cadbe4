"""Streams, devices, graphs, synchronization and memory: what a kernel must not do besides computing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import gpu.needed  # noqa: F401  (skips this file without a GPU)
import pytest
import torch
from gpu.on_gpu import DEQUANTIZE, explained, forced, moved
from kernels import exact
from kernels.problems import Problem, make

from nybble import QuantConfig, QuantLinear, QuantTensor, ops
from nybble.backends import cuda

ROWS = (1, 16, 48, 300)


def every_kernel(gpu: torch.device) -> Iterator[Problem]:
    """One problem of each direction for few and many rows, with bias and side path; 4 bits and int8."""
    for m, grad, int8 in itertools.product(ROWS, (False, True), (False, True)):
        yield exact.make(512, 1024, m, rank=16, bias=True, grad=grad, int8=int8, device=gpu)
    yield exact.make(130, 1000, 33, rank=3, device=gpu)
    yield exact.make(130, 1000, 5, dtype=torch.float32, device=gpu)


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Inside, torch raises where it waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_work_goes_to_the_current_stream(gpu: torch.device) -> None:
    # The stream is kept busy before x is written; on any other stream the kernel would read what was there before.
    stream = torch.cuda.Stream(gpu)
    busy = torch.randn(4096, 4096, device=gpu)
    for problem in every_kernel(gpu):
        answer = exact.answer(problem)
        x, problem.x = problem.x, torch.full_like(problem.x, 3)
        problem.run()  # compiles, loads and makes this stream's workspace
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(8):
                busy = torch.tanh(busy @ busy)
            problem.x.copy_(x)
            out = problem.run()
        stream.synchronize()
        if explained(problem)["kernel"] != DEQUANTIZE:
            assert torch.equal(out, answer), problem


def test_two_streams_do_not_share_counters_or_partial_sums(gpu: torch.device) -> None:
    # Few rows and few columns: the case in which kernels split k among blocks and sum through the workspace.
    streams = [torch.cuda.Stream(gpu) for _ in range(3)]
    problems = [exact.make(64, 16384, 1 + 9 * i, grad=False, seed=i, device=gpu) for i in range(3)]
    answers = [exact.answer(problem) for problem in problems]
    torch.cuda.synchronize()
    outputs = []
    for _ in range(50):
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(problem.run())
    torch.cuda.synchronize()
    for index, out in enumerate(outputs):
        assert torch.equal(out, answers[index % 3])


def test_another_device_than_the_current_one(gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    other = torch.device("cuda", (gpu.index + 1) % torch.cuda.device_count())
    assert torch.cuda.current_device() == gpu.index
    for problem in every_kernel(other):
        out = problem.run()
        assert out.device == other
        if explained(problem)["kernel"] != DEQUANTIZE:
            assert torch.equal(out, exact.answer(problem))
    tensor = QuantTensor.quantize(torch.randn(64, 64, device=other))
    assert tensor.dequantize().device == other
    assert torch.cuda.current_device() == gpu.index


def test_graphs_replay_with_new_inputs(gpu: torch.device) -> None:
    for problem in every_kernel(gpu):
        rows = problem.weight.shape[0]
        warm = torch.cuda.Stream(gpu)
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            problem.run()
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = problem.run()
            dense = problem.weight.dequantize(torch.bfloat16)
        for seed in range(3):
            problem.x.copy_(exact.integers(-4, 4, *problem.x.shape, device=gpu, seed=seed, dtype=problem.x.dtype))
            out.fill_(float("nan"))
            dense.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(dense.double(), exact.rows_of(problem.weight, 0, rows))
            if explained(problem)["kernel"] != DEQUANTIZE:
                assert torch.equal(out, exact.answer(problem)), problem


def test_nothing_waits_for_the_gpu(gpu: torch.device) -> None:
    problems = list(every_kernel(gpu))
    for problem in problems:
        problem.run()
    layer = QuantLinear.from_linear(torch.nn.Linear(512, 256, device=gpu, dtype=torch.bfloat16))
    x = torch.randn(40, 512, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    tensor = problems[0].weight
    with no_synchronization():
        for problem in problems:
            problem.run()
        layer(x).sum().backward()
        tensor.dequantize(torch.float16)
    with pytest.raises(RuntimeError), no_synchronization():
        x.sum().item()


def test_memory_does_not_grow(gpu: torch.device) -> None:
    problems = list(every_kernel(gpu))
    for _ in range(2):
        for problem in problems:
            problem.run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(gpu)
    reserved = torch.cuda.memory_reserved(gpu)
    for _ in range(20):
        for problem in problems:
            problem.run()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated(gpu) == before
    assert torch.cuda.memory_reserved(gpu) == reserved


@pytest.mark.parametrize("m", [16, 512, 4096])
def test_grad_input_needs_no_dense_weight(gpu: torch.device, m: int) -> None:
    n, k = 8192, 4096
    problem = exact.make(n, k, m, grad=True, device=gpu)
    problem.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(gpu)
    before = torch.cuda.memory_allocated(gpu)
    out = problem.run()
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated(gpu) - before
    assert used <= out.numel() * out.element_size() + (1 << 20), f"{used} bytes beside {n * k * 2} of a dense weight"


def test_quantizing_in_a_graph_does_not_wait(gpu: torch.device) -> None:
    weight, codes = torch.randn(256, 256, device=gpu), QuantConfig().codebook.to(gpu)
    expected = cuda.quantize_4bit(weight, codes, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.quantize_4bit(weight, codes, 64)
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_call_from_another_thread(gpu: torch.device) -> None:
    from concurrent.futures import ThreadPoolExecutor

    problem = exact.make(256, 512, 20, device=gpu)
    answer = exact.answer(problem)
    with forced("linear_mma"), ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: problem.run(), range(32)):
            assert torch.equal(out, answer)


def test_a_freed_input_is_not_read_too_late(gpu: torch.device) -> None:
    # x is copied (a column stride) and given back to the allocator while the kernel may not have started.
    problem = moved(make(128, 256, 30, dtype=torch.bfloat16, layout="column_stride"), gpu)
    right = problem.run()
    for _ in range(20):
        out = ops.linear(problem.x, problem.packed)
        torch.full((30, 256), float("nan"), dtype=torch.bfloat16, device=gpu)
        assert torch.equal(out, right)
