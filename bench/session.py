"""What every bench script does around its cases: options, ceilings, tables, JSON lines, the plot."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import ceilings
import harness
import torch
from harness import Call, race
from peers import Layers, Missing
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import nybble
from nybble import _core

#: (out_features, in_features): attention, and both directions of a feed-forward layer of a 7B model.
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
#: Results are compared with a dense product up to this many rows of x.
CHECKED_ROWS = 256

Factory = Callable[[Tensor, int], Layers]
Row = dict[str, object]


def parse(doc: str | None, rows: Iterable[int] = (), seconds: float = 0.4) -> argparse.Namespace:
    """The options that all scripts share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="out_features,in_features; may be repeated")
    parser.add_argument("--m", action="append", type=int, help="rows of x; may be repeated")
    parser.add_argument("--seconds", type=float, default=seconds, help="per contestant and case, on average")
    parser.add_argument(
        "--rotation", type=int, default=harness.default_rotation() >> 20, help="MB that the copies fill"
    )
    parser.add_argument("--only", default="", help="race contestants whose name holds one of these, comma-separated")
    parser.add_argument("--isa", help="the instruction set that nybble uses")
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--json", type=Path, default=ceilings.RESULTS / "bench.jsonl")
    args = parser.parse_args()
    args.shapes = [tuple(map(int, text.split(","))) for text in args.shape] if args.shape else list(SHAPES)
    args.rows = args.m or list(rows)
    args.rotation <<= 20
    if args.isa:
        _core.set_active_isa(args.isa)
    torch.manual_seed(0)
    return args


@lru_cache(maxsize=1)
def _read_loops(weight_bytes: int, rotation: int) -> dict[str, Call]:
    return ceilings.read_loops(weight_bytes, rotation)


class Session:
    """The cases of one op: raced, printed, appended, drawn."""

    def __init__(self, op: str, args: argparse.Namespace) -> None:
        self.op, self.args, self.rows, self.notes = op, args, [], []
        self.console = Console(width=160)
        self.machine = harness.machine()
        self.console.print(f"[bold]{op}[/bold]: {harness.machine_line()}, rotation {args.rotation >> 20} MB")
        if ceilings.note():
            self.note(ceilings.note())

    def note(self, text: str) -> None:
        """Printed once."""
        if text not in self.notes:
            self.notes.append(text)
            self.console.print(f"  note: {escape(text)}")

    def build(self, factories: dict[str, Factory], weight: Tensor) -> dict[str, Layers]:
        """The layers of each factory; absent peers become notes."""
        built = {}
        for name, factory in factories.items():
            if not self._wanted(name):
                continue
            try:
                built[name] = factory(weight, self.args.rotation)
            except Missing as reason:
                self.note(f"{name} is left out: {reason}")
        return built

    def _wanted(self, name: str) -> bool:
        return not self.args.only or any(part in name for part in ("nybble", *self.args.only.split(",")))

    def bind(self, built: dict[str, Layers], x: Tensor) -> dict[str, Call]:
        """Contestants for this x, of the layers that compute the right thing."""
        calls = {}
        for name, layers in built.items():
            try:
                if x.shape[0] <= CHECKED_ROWS:
                    layers.check(name, x)
                calls[name] = layers.bind(x)
            except Missing as reason:
                self.note(f"{name} is left out at M = {x.shape[0]}: {reason}")
        return calls

    def case(
        self,
        group: str,
        column: str,
        contestants: dict[str, Call],
        *,
        reads: int = 0,
        operations: float = 0.0,
        multiply: str | None = None,
        repeats: int = 1,
        **facts: object,
    ) -> Row:
        """Races the contestants with the ceilings that bound them, and keeps the result.

        Args:
            group: the table that the case stands in. column: its column there.
            reads: bytes that the op has to read; with it, the read loops run too.
            operations: multiplies and adds. multiply: "bf16", "fp32" or "int8"; with it, the peak loop runs too.
            repeats: calls that a contestant makes by itself each time; times are divided by it.
            facts: anything else that tells the case (n, k, m, dtype), for the JSON line.
        """
        loops = _read_loops(reads, self.args.rotation) if reads else {}
        peak = ceilings.peak_loop(multiply, nybble.active_isa()) if multiply else None
        calls = {**contestants, **loops, **({peak[0]: peak[2]} if peak else {})}
        timings = race(calls, self.args.seconds)
        row: Row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "op": self.op,
            "group": group,
            "column": column,
            **facts,
            "bytes": reads,
            "operations": operations,
            "rotation": self.args.rotation,
            "machine": {**self.machine, "active": nybble.active_isa()},
            "timings": {name: asdict(timings[name].divided(repeats)) for name in contestants},
            "read_gbs": {name: reads / timings[name].median / 1e9 for name in loops},
            "peak_gflops": {peak[0]: peak[1] / timings[peak[0]].median / 1e9} if peak else {},
        }
        self.rows.append(row)
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        with self.args.json.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        return row

    def finish(self, unit: str = "ms") -> None:
        """Prints one table a group, and draws the op's plot."""
        for group in dict.fromkeys(row["group"] for row in self.rows):
            self._print(group, [row for row in self.rows if row["group"] == group], unit)
        if not self.args.no_plot:
            from plots import draw

            path = draw(self.op, self.rows, self.args.json.parent)
            if path:
                self.console.print(f"  plot: {path.name}")

    def _print(self, group: str, rows: list[Row], unit: str) -> None:
        table = Table(title=f"{self.op}, {group}: {unit} a call, median (times as long as the first line)")
        table.add_column("")
        for row in rows:
            table.add_column(row["column"], justify="right")
        scale = {"ms": 1e3, "us": 1e6}[unit]
        first = next(iter(rows[0]["timings"]))
        for name in dict.fromkeys(name for row in rows for name in row["timings"]):
            cells = []
            for row in rows:
                timing, base = row["timings"].get(name), row["timings"].get(first)
                ratio = f" ({timing['median'] / base['median']:.2f})" if timing and base and name != first else ""
                cells.append(f"{timing['median'] * scale:.3g}{ratio}" if timing else "-")
            table.add_row(name, *cells)
        table.add_section()
        for key, label in (("read_gbs", "GB/s"), ("peak_gflops", "GFLOP/s")):
            for name in dict.fromkeys(name for row in rows for name in row[key]):
                table.add_row(
                    f"{name}, {label}", *(f"{row[key][name]:.4g}" if name in row[key] else "-" for row in rows)
                )
        self._own_rates(table, rows, first)
        self.console.print(table)

    @staticmethod
    def _own_rates(table: Table, rows: list[Row], first: str) -> None:
        for key, limits, label in (("bytes", "read_gbs", "GB/s"), ("operations", "peak_gflops", "GFLOP/s")):
            if any(row[limits] for row in rows):
                rates = [row[key] / row["timings"][first]["median"] / 1e9 for row in rows]
                table.add_row(f"{first}, {label}", *(f"{rate:.4g}" for rate in rates))
