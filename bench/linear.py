"""Forward and grad_input of one quantized linear layer, beside bitsandbytes' and torch's bf16 matmul.

    python bench/linear.py [--shape N,K ...] [--m M ...] [--seconds S] [--json FILE]

NF4, block 64, double quantization, bf16 activations. bitsandbytes runs as its users run it: forward in eval mode
("eval", its fused kernel where it has one) and in train mode ("train"), and its backward. Its own warnings are kept.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Timing, append_json, as_row, copies_for, last_level_cache, race
from rich.console import Console
from rich.table import Table
from torch import nn

import nybble

SHAPES = ((4096, 4096), (11008, 4096))
ROWS = (1, 16, 256, 1024)


def bitsandbytes_layers(base: nn.Linear, count: int) -> list[nn.Module] | None:
    """`count` copies of the layer as bitsandbytes' Linear4bit, or None without the package."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    layers = []
    for _ in range(count):
        layer = bnb.nn.Linear4bit(
            base.in_features,
            base.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=True,
        )
        layer.weight = bnb.nn.Params4bit(
            base.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        layers.append(layer.to("cpu"))
    return layers


def forward(layers: list[nn.Module], x: torch.Tensor) -> Callable[[int], object]:
    """Calls one layer after the other without gradient."""

    def call(turn: int) -> object:
        with torch.no_grad():
            return layers[turn % len(layers)](x)

    return call


def backward(layers: list[nn.Module], x: torch.Tensor, g: torch.Tensor) -> Callable[[int], object]:
    """The gradient with respect to x alone: graphs are built once, outside the measured call."""
    graphs = []
    for layer in layers:
        leaf = x.detach().clone().requires_grad_()
        graphs.append((leaf, layer(leaf)))

    def call(turn: int) -> object:
        leaf, y = graphs[turn % len(graphs)]
        return torch.autograd.grad(y, leaf, g, retain_graph=True)

    return call


def contestants(n: int, k: int, m: int) -> dict[str, dict[str, Callable[[int], object]]]:
    torch.manual_seed(0)
    base = nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    quantized = nybble.QuantLinear.from_linear(base)
    packed_copies = copies_for(n * k // 2)
    plain_copies = copies_for(n * k * 2)
    ours = [copy.deepcopy(quantized) for _ in range(packed_copies)]
    plain = [copy.deepcopy(base) for _ in range(plain_copies)]
    x = torch.randn(m, k, dtype=torch.bfloat16)
    g = torch.randn(m, n, dtype=torch.bfloat16)
    runs = {
        "forward": {"nybble": forward(ours, x), "torch bf16": forward(plain, x)},
        "grad_input": {"nybble": backward(ours, x, g), "torch bf16": backward(plain, x, g)},
    }
    peers = bitsandbytes_layers(base, packed_copies)
    if peers is not None:
        trained = [peer.train() for peer in bitsandbytes_layers(base, packed_copies) or []]
        runs["forward"]["bitsandbytes eval"] = forward([peer.eval() for peer in peers], x)
        leaf = x.detach().clone().requires_grad_()
        runs["forward"]["bitsandbytes train"] = lambda turn: trained[turn % len(trained)](leaf)
        runs["grad_input"]["bitsandbytes"] = backward(trained, x, g)
    return runs


def cell(timing: Timing | None, ours: Timing) -> str:
    if timing is None:
        return "-"
    return f"{timing.median * 1e3:.2f} ({timing.median / ours.median:.2f}x)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="out_features,in_features")
    parser.add_argument("--m", action="append", type=int)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contestant and case")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "linear.jsonl")
    args = parser.parse_args()
    shapes = [tuple(map(int, text.split(","))) for text in args.shape] if args.shape else SHAPES
    console = Console(width=150)
    console.print(
        f"{platform.machine()}, {nybble.active_isa()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"last-level cache {last_level_cache()}"
    )
    table = Table(title="ms a call, median; in brackets: times as long as nybble")
    names = ("torch bf16", "bitsandbytes eval", "bitsandbytes train", "bitsandbytes")
    for column in ("N x K", "M", "direction", "kernel", "nybble", *names):
        table.add_column(column, justify="right" if column not in ("direction", "kernel") else "left")
    for n, k in shapes:
        for m in args.m or ROWS:
            for direction, runs in contestants(n, k, m).items():
                timings = race(runs, args.seconds)
                ours = timings["nybble"]
                chosen = nybble.explain((n, k), m=m, grad_input=direction == "grad_input")
                append_json(args.json, as_row({"n": n, "k": k, "m": m, "op": direction, "isa": chosen.isa}, timings))
                cells = [cell(timings.get(name), ours) for name in names]
                table.add_row(f"{n} x {k}", str(m), direction, chosen.kernel, f"{ours.median * 1e3:.2f}", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
