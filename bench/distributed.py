"""Several processes that train one model: losses beside one process, packed bytes, memory, bytes sent.

python bench/distributed.py [--keep DIR] [--only NAME ...] [--tables]

A Llama of 170 M random parameters (`finetune.py`), NF4 + LoRA r = 16 and in full, on the King James Bible; processes of
one machine, through gloo. They share its cores, so nothing is said of speed. What has been measured is kept in DIR
and not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from distributed_worker import Job
from finetune import prepare
from rich.console import Console
from rich.table import Table

import nybble
from nybble.backends.products import emulated
from nybble.planning import Cluster, Work, find_shape, scaled_step
from nybble.planning.shapes import Shape

SIZES = (1, 2, 4)
#: What the losses are compared in: the same global batch, 4 rows of 128 words, 4 steps.
LOSSES = {
    f"{dtype} {parallel} {size}": (parallel, size, "lora", dtype, 4, 128, 4)
    for dtype in ("fp32", "bf16")
    for parallel, sizes in (("none", (1,)), ("ddp", SIZES[1:]), ("fsdp", SIZES[1:]))
    for size in sizes
}
#: What memory is measured with: one row of 64 words for every process, so that weights are most of it; what is held, as
#: `nybble plan` counts it, so without the holes of glibc's heap (low_memory).
MEMORY = {
    f"memory {method} {parallel} {size}": (parallel, size, method, "bf16", size, 64, 3)
    for method in ("lora", "full")
    for parallel in ("ddp", "fsdp")
    for size in SIZES
}
PIECES = {**LOSSES, **MEMORY}


def measure(name: str, files: dict[str, str], directory: Path) -> list[dict[str, Any]]:
    """What every process of a piece found, from a file if it was measured before."""
    kept = directory / f"{name.replace(' ', '-')}.json"
    if not kept.exists():
        kept.write_text(json.dumps(run(name, files)))
    return json.loads(kept.read_text())


def run(name: str, files: dict[str, str]) -> list[dict[str, Any]]:
    parallel, size, method, dtype, batch_size, seq_len, steps = PIECES[name]
    model = files["nf4"] if method == "lora" else files["bf16"]
    low_memory = name in MEMORY
    job = Job(
        parallel, method, model, files["adapter"], files["rows.pt"], steps, batch_size, seq_len, dtype, low_memory
    )
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // size)
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    worker = str(Path(__file__).with_name("distributed_worker.py"))
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, worker, json.dumps(asdict(job)), out]
        processes = [subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}) for rank in range(size)]
        if any([process.wait() for process in processes]):
            raise SystemExit(f"{name}: a process failed")
        return [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(size)]


def losses_table(found: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(title="LoRA over NF4, losses beside one process at the same global batch")
    for column in ("compute", "parallel", "processes", "loss, first", "last", "largest difference", "packed bytes"):
        table.add_column(column)
    for name, (parallel, size, _, dtype, *_) in LOSSES.items():
        alone = found.get(f"{dtype} none 1")
        if name not in found or alone is None:
            continue
        ranks = found[name]
        far = max(abs(a - b) for r in ranks for a, b in zip(r["losses"], alone[0]["losses"], strict=True))
        hashes = {h for r in ranks for h in r["hashes"]} | set(alone[0]["hashes"])
        same = f"{len(ranks)} x 2 hashes, all {min(hashes)[:8]}" if len(hashes) == 1 else "DIFFER"
        losses = ranks[0]["losses"]
        table.add_row(dtype, parallel, str(size), f"{losses[0]:.6f}", f"{losses[-1]:.6f}", f"{far:.1e}", same)
    return table


def memory_table(found: dict[str, list[dict[str, Any]]], shape: Shape) -> Table:
    table = Table(title="Peak memory of the largest process above its imports, MB, one row of 64 words a process")
    for column in ("method", "parallel", "processes", "its own", "with its share of common pages", "formula", "error"):
        table.add_column(column)
    for name, (parallel, size, method, _, _, seq_len, _) in MEMORY.items():
        if name not in found:
            continue
        own, share = (max(r["memory"][kind] for r in found[name]) for kind in ("own", "share"))
        cells = [f"{own / 1e6:.0f}", f"{share / 1e6:.0f}"]
        if (
            parallel == "fsdp"
        ):  # DDP's processes share the pages of one mapped file; on machines of their own they do not
            cpu = {"matrix_unit": nybble.active_isa() == "amx", "widened": emulated(torch.bfloat16)}
            work = Work(batch=1, seq=seq_len, **cpu)
            base = "nf4" if method == "lora" else "fp32"
            step = scaled_step(shape, method, base, work, Cluster(size, "fsdp"), checkpointing=False)
            cells += [f"{step.rank.above_imports / 1e6:.0f}", f"{step.rank.above_imports / share - 1:+.1%}"]
        table.add_row(method, parallel, str(size), *cells)
    return table


def bytes_table(found: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(title="Bytes a step (MB), of whole tensors; each process receives (N - 1) / N of them")
    for column in ("method", "parallel", "processes", "gathered", "formula", "reduced", "formula"):
        table.add_column(column)
    for name, (parallel, size, method, *_) in MEMORY.items():
        if name not in found or size == 1:
            continue
        sent, formula = found[name][0]["sent"], found[name][0]["formula"]
        if parallel == "ddp":
            cells = ("0", "0", f"{sent['reduced for all'] / 1e6:.3f}", f"{formula['reduced'] / 1e6:.3f}")
        else:
            pairs = ((values.get(kind, 0) / 1e6) for kind in ("gathered", "reduced") for values in (sent, formula))
            cells = tuple(f"{value:.3f}" for value in pairs)  # type: ignore[assignment]  # four of them
        table.add_row(method, parallel, str(size), *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="directory for the model and the measurements, which is used again")
    parser.add_argument("--only", nargs="*", default=list(PIECES), help="these pieces alone")
    parser.add_argument("--tables", action="store_true", help="measure nothing, show what has been")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.keep or Path(temporary)
        directory.mkdir(exist_ok=True)
        files = {name: str(directory / name) for name in ("bf16", "nf4", "adapter", "rows.pt")}
        if not all(Path(file).exists() for file in files.values()):
            files = prepare(directory)
        names = [] if args.tables else args.only
        for name in names:
            measure(name, files, directory)
        known = {name for name in PIECES if (directory / f"{name.replace(' ', '-')}.json").exists()}
        found = {name: measure(name, files, directory) for name in PIECES if name in known}
        console = Console(width=130)
        for table in (losses_table(found), memory_table(found, find_shape(files["bf16"])), bytes_table(found)):
            if table.row_count:
                console.print(table)


if __name__ == "__main__":
    main()
