"""linear and grad_input on an Apple GPU beside torch's fp16 matmul and, if installed, MLX's quantized_matmul.

    python bench/metal.py [--seconds S] [--dry-run]

Contestants take turns; a figure is the median over turns of the time of one call, out of many that are queued before
the GPU is waited for. Weights rotate through 256 MB, so that no cache holds them. --dry-run: small CPU tensors, which
shows that every line runs and says nothing of speed.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nybble import QuantConfig, QuantTensor, backends, ops

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
ROWS = (1, 4, 8, 32, 128, 512)
ROTATION = 256e6
BLOCK = 64
TURNS = 5
Call = Callable[[], Any]


def contestants(n: int, k: int, m: int, device: torch.device) -> tuple[dict[str, Call], Call]:
    """What is compared, and what waits for all of it; each call takes the next of several weights."""
    copies = 2 if device.type == "cpu" else max(2, int(ROTATION / (n * k / 2)))
    x = torch.randn(m, k, device=device, dtype=torch.float16)
    g = torch.randn(m, n, device=device, dtype=torch.float16)
    dense = [torch.randn(n, k, device=device, dtype=torch.float16) for _ in range(2)]
    one = QuantTensor.quantize(dense[0], QuantConfig("nf4", block_size=BLOCK)).packed_weight()
    packed = [one, *(one._replace(packed=one.packed.clone(), absmax=one.absmax.clone()) for _ in range(copies - 1))]
    plain, forward, backward = (itertools.cycle(weights) for weights in (dense, packed, packed))

    def wait() -> None:
        if device.type == "mps":
            torch.mps.synchronize()

    calls: dict[str, Call] = {
        "fp16 matmul": lambda: x @ next(plain).t(),
        "nybble": lambda: ops.linear(x, next(forward)),
        "nybble grad_input": lambda: ops.grad_input(g, next(backward)),
    }
    return calls, wait


def mlx_contestant(n: int, k: int, m: int, small: bool) -> Call | None:
    """MLX's own 4 bits (affine, groups of 64), evaluated one by one; None where MLX is not installed."""
    try:
        import mlx.core as mx
    except ImportError:
        return None
    x = mx.random.normal((m, k)).astype(mx.float16)
    dense = mx.random.normal((n, k)).astype(mx.float16)
    weights = itertools.cycle(
        [mx.quantize(dense * (1 + i), group_size=BLOCK, bits=4) for i in range(2 if small else 8)]
    )

    def call() -> None:
        w, scales, biases = next(weights)
        mx.eval(mx.quantized_matmul(x, w, scales, biases, transpose=True, group_size=BLOCK, bits=4))

    return call


def turn(call: Call, wait: Call, seconds: float) -> float:
    """Seconds a call, over as many as fit."""
    call()
    wait()
    started = time.perf_counter()
    call()
    wait()
    count = max(1, min(1000, int(seconds / max(time.perf_counter() - started, 1e-7))))
    started = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return (time.perf_counter() - started) / count


def rows(device: torch.device, seconds: float, dry: bool) -> Iterator[str]:
    """The table, a line at a time."""
    heads = ("fp16 us", 9), ("nybble us", 9), ("x fp16", 6), ("GB/s", 6), ("grad us", 9), ("MLX us", 9)
    yield f"{'N x K':>13} {'M':>4} " + " ".join(f"{head:>{width}}" for head, width in heads)
    for (n, k), m in itertools.product(((64, 128),) if dry else SHAPES, ROWS[::3] if dry else ROWS):
        calls, wait = contestants(n, k, m, device)
        mlx = mlx_contestant(n, k, m, dry)
        if mlx is not None:
            calls["MLX"] = mlx
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(TURNS):
            for name, call in calls.items():
                found[name].append(turn(call, wait, seconds / TURNS))
        took = {name: statistics.median(times) for name, times in found.items()}
        rate = (n * k / 2 + n * k / BLOCK) / took["nybble"] / 1e9
        yield (
            f"{n:>6} x {k:>4} {m:>4} {1e6 * took['fp16 matmul']:>9.1f} {1e6 * took['nybble']:>9.1f} "
            f"{took['fp16 matmul'] / took['nybble']:>6.2f} {rate:>6.1f} {1e6 * took['nybble grad_input']:>9.1f} "
            + (f"{1e6 * took['MLX']:>9.1f}" if mlx is not None else f"{'-':>9}")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each contestant and shape")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "mps")
    if options.dry_run:
        print("dry run on the CPU: the numbers mean nothing")
    elif backends.mps.missing(device):
        parser.exit(1, f"{backends.mps.missing(device)}\n")
    print(f"macOS {platform.mac_ver()[0] or '-'}, {platform.machine()}, torch {torch.__version__}")
    for line in rows(device, 0.001 if options.dry_run else options.seconds, options.dry_run):
        print(line, flush=True)


if __name__ == "__main__":
    main()
