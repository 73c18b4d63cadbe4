"""What `nybble plan` predicts beside what a step takes: SHOW of planning, and the tables of docs/scaling.md.

python bench/plan.py table|measured|scaling|all [--keep DIR] [--seconds N]

table     Llama-3.1-8B on a machine of 24 GB
measured  the Llama of 170 M parameters of finetune.py: predictions beside peaks, each of a process of its own; once
          with --low-memory (what is held), once with glibc's heap as a run has it by default
scaling   Llama-3.1-70B and 405B on 8, 16 and 64 GPUs

What has been measured is kept in DIR and not measured again; --seconds: begin no further measurement after so many.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from finetune import prepare
from rich.console import Console
from rich.table import Table

import nybble
import nybble.cli.plan as command
from nybble.backends.products import emulated
from nybble.planning import BUILT_IN, Cluster, Work, estimate, find_shape, plan, scaled_step

WORKER = Path(__file__).resolve().parents[1] / "tests" / "planning" / "measured_step.py"
# method, base, batch, seq, checkpointing, optimizer, rank
CONFIGURATIONS = (
    ("lora", "nf4", 4, 256, False, "adamw", 16),
    ("lora", "nf4", 4, 256, True, "adamw", 16),
    ("lora", "bf16", 4, 256, False, "adamw", 16),
    ("lora", "bf16", 4, 256, True, "adamw", 16),
    ("lora", "nf4", 2, 1024, True, "adamw8bit", 64),
    ("dora", "bf16", 4, 256, False, "adamw", 16),
    ("bottleneck", "nf4", 4, 256, False, "adamw", 16),
    ("prefix", "nf4", 4, 256, False, "adamw", 16),
    ("prompt", "nf4", 4, 256, True, "adamw", 16),
    ("full", "fp32", 1, 256, False, "adamw", 16),
    ("full", "fp32", 4, 256, True, "adamw8bit", 16),
)
#: Bytes a second that a rank is assumed to receive: within a node, and between nodes by a network card for every GPU.
BANDWIDTH = {8: 300e9, 16: 50e9, 64: 50e9}
FIELDS = ("method", "base", "batch", "seq", "checkpointing", "optimizer", "rank")


def table(args: argparse.Namespace) -> None:
    """The table that people choose by."""
    found = plan("Llama-3.1-8B", 24e9)
    command.show(found, [found.row("qlora")])


def _measure(configuration: tuple[Any, ...], low_memory: bool, directory: Path) -> tuple[int, float]:
    """The peak above the imports, and the CPU's seconds; from a file if it was measured before."""
    name = "-".join(map(str, (*configuration, "held" if low_memory else "heap")))
    kept = directory / f"{name}.json"
    if not kept.exists():
        model = directory / ("nf4" if configuration[1] == "nf4" else "bf16")
        job = {**dict(zip(FIELDS, configuration, strict=True)), "model": str(model), "steps": 2}
        job["low_memory"] = low_memory
        done = subprocess.run(
            [sys.executable, str(WORKER), json.dumps(job)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        kept.write_text(done.stdout.splitlines()[-1])
    found = json.loads(kept.read_text())
    return int(found["peak"]), float(found["cpu"])


def measured(args: argparse.Namespace) -> None:
    """Predicted, measured, error."""
    directory: Path = args.keep
    if not (directory / "rows.pt").exists():
        prepare(directory)
    shape = find_shape(directory / "bf16")
    shown = Table(title=f"{shape.parameters:,} parameters; MB above the imports", title_justify="left")
    for column in (
        "method",
        "step",
        "optimizer",
        "checkpointing",
        "predicted",
        "held",
        "error",
        "in glibc's heap",
        "CPU time",
    ):
        shown.add_column(column, justify="left" if column in ("method", "optimizer", "checkpointing") else "right")
    worst = 0.0
    for configuration in CONFIGURATIONS:
        method, base, batch, seq, checkpointing, optimizer, rank = configuration
        if time.perf_counter() - args.started > args.seconds:
            print("more is to be measured: call again with the same --keep")
            break
        (held, slower), (heap, faster) = (
            _measure(configuration, low_memory, directory) for low_memory in (True, False)
        )
        cpu = {"matrix_unit": nybble.active_isa() == "amx", "widened": emulated(torch.bfloat16)}
        work = Work(batch=batch, seq=seq, rank=rank, optimizer=optimizer, **cpu)
        predicted = estimate(shape, method, base, work, checkpointing).above_imports
        error = predicted / held - 1
        worst = max(worst, abs(error))
        shown.add_row(
            f"{method} {base}" + (f" r = {rank}" if method in ("lora", "dora") else ""),
            f"{batch} x {seq}",
            optimizer,
            "yes" if checkpointing else "no",
            *(f"{count / 1e6:.0f}" for count in (predicted, held)),
            f"{error:+.1%}",
            f"{heap / 1e6:.0f} ({heap / held:.2f}x)",
            f"{slower / faster:.2f}x",
        )
    Console(width=120).print(shown)
    print(f"largest error {worst:.1%}")


def scaling(args: argparse.Namespace) -> None:
    """Memory of a rank, bytes and seconds of a step."""
    title = "a row of 2,048 tokens a rank, rank 16, checkpointing; assumed: 400 TFLOP/s, 300 GB/s (8 ranks), 50 GB/s"
    shown = Table(title=title)
    columns = (
        "model",
        "method",
        "ranks",
        "sharding",
        "memory",
        "gathered",
        "reduced",
        "received",
        "operations",
        "step, s",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column in ("model", "method", "sharding") else "right")
    work = Work(device="cuda")
    for name in ("Llama-3.1-70B", "Llama-3.1-405B"):
        for base, sharding in (("nf4", "ddp"), ("nf4", "fsdp"), ("bf16", "fsdp")):
            for ranks in BANDWIDTH:
                step = scaled_step(
                    BUILT_IN[name], "lora", base, work, Cluster(ranks, sharding, 400e12, BANDWIDTH[ranks])
                )
                shown.add_row(
                    name,
                    f"LoRA over {base}",
                    str(ranks),
                    sharding,
                    f"{step.rank.total / 1e9:.1f} GB",
                    f"{step.gathered / 1e9:.1f} GB",
                    f"{step.reduced / 1e9:.2f} GB",
                    f"{step.received / 1e9:.1f} GB",
                    f"{step.operations / 1e12:,.0f} T",
                    f"{step.least:.2f} to {step.most:.2f}",
                )
    Console(width=140).print(shown)


COMMANDS = {"table": table, "measured": measured, "scaling": scaling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=(*COMMANDS, "all"))
    parser.add_argument("--keep", type=Path, help="directory for the model and what was measured, which is used again")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    args.started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        args.keep = args.keep or Path(temporary)
        args.keep.mkdir(parents=True, exist_ok=True)
        for name in COMMANDS if args.command == "all" else (args.command,):
            COMMANDS[name](args)


if __name__ == "__main__":
    main()
