"""Runs the bench scripts one after the other and says which targets are reached.

python bench/run.py [--ops OP,...] [--quick] [--launcher "CMD ..."] [--report FILE]

--launcher stands before each script, e.g. "chrt -f 20" or "taskset -c 0,1". --report judges an earlier run's JSON
lines. Writes bench/results/: bench.jsonl (grows), targets.md, and a plot for each op.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import plots
from ceilings import RESULTS
from rich.console import Console
from rich.table import Table
from session import SHAPES
from targets import ceilings_met, judged

FOLDER = Path(__file__).parent
#: torch, oneDNN and MKL as on a machine without AVX-512.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
HEADER = ("what", "compared with", "target", "measured", "reached")


def parts(quick: bool) -> list[tuple[str, list[str], dict[str, str]]]:
    """Op, arguments with the script first, environment: a process each, so that one shape's copies leave memory."""
    shapes = [f"{n},{k}" for n, k in (SHAPES[:1] if quick else SHAPES)]
    result = []
    for shape in shapes:
        at = ["--shape", shape]
        result += [("forward", ["forward.py", *at, *rows("1 4 8 16")], {})]
        result += [("forward", ["forward.py", *at, *rows("64 256 1024")], {})]
        result += [(op, [f"{op}.py", *at], {}) for op in ("grad_input", "train", "int8", "fp32", "codec")]
        result += [("avx2", ["fp32.py", "--isa", "avx2", *at], AVX2)]
    return [
        *result,
        ("rounding", ["rounding.py"], {}),
        ("attention", ["attention.py"], {}),
        ("optimizer", ["optimizer.py"], {}),
        ("elementwise", ["elementwise.py"], {}),
        ("overhead", ["overhead.py"], {}),
    ]


def rows(text: str) -> list[str]:
    """--m for each number."""
    return [part for m in text.split() for part in ("--m", m)]


def read(path: Path, offset: int = 0) -> list[dict]:
    """The JSON lines from this byte on."""
    if not path.exists():
        return []
    with path.open("rb") as lines:
        lines.seek(offset)
        return [json.loads(line) for line in lines]


def report(measured: list[dict], folder: Path) -> None:
    """Prints the table of targets and writes it as Markdown; draws the plots."""
    table = Table(title="targets; measured: one ratio a shape (N, K), " + ", ".join(map(str, SHAPES)))
    for column in HEADER:
        table.add_column(column)
    lines = judged(measured)
    for line in lines:
        table.add_row(*line, style={"yes": "green", "no": "red"}.get(line[-1]))
    console = Console(width=160)
    console.print(table)
    limits = ", ".join(f"{name} {rate:.4g}" for name, rate in ceilings_met(measured).items())
    reached = sum(line[-1] == "yes" for line in lines)
    console.print(f"{reached} of {len(lines)} reached. Ceilings (median over the run): {limits}")
    head = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    text = [*head, *("| " + " | ".join(line) + " |" for line in lines), "", f"Ceilings: {limits}", ""]
    (folder / "targets.md").write_text("\n".join(text), encoding="utf-8")
    for op in dict.fromkeys(row["op"] for row in measured):
        drawn = plots.draw(op, measured, folder)
        if drawn:
            console.print(f"plot: {drawn}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help="comma-separated: forward, grad_input, train, int8, fp32, avx2, ...")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--launcher", default="", help="command that starts each script")
    parser.add_argument("--report", type=Path, help="judge these JSON lines, run nothing")
    parser.add_argument("rest", nargs="*", help="after --: options for every script, e.g. --seconds 1 --rotation 512")
    args = parser.parse_args()
    if args.report:
        report(read(args.report), args.report.parent)
        return 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "bench.jsonl"
    offset = path.stat().st_size if path.exists() else 0
    start, failed = time.monotonic(), []
    for op, command, environment in parts(args.quick):
        if args.ops and op not in args.ops.split(","):
            continue
        whole = [*shlex.split(args.launcher), sys.executable, str(FOLDER / command[0]), *command[1:], "--no-plot"]
        whole += ["--json", str(path), *args.rest]
        if subprocess.run(whole, env={**os.environ, **environment}).returncode:
            failed.append(" ".join(command))
    report(read(path, offset), RESULTS)
    print(f"{time.monotonic() - start:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
