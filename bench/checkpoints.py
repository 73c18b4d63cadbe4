"""Checkpoints beside the disk and beside transformers with bitsandbytes: the figures of the README.

python bench/checkpoints.py quantize|processes|kill|interop|load|merge|answer|all [--work DIR] [--json FILE]

quantize  8.6 GB of bf16 under max_memory=512MB: memory, and speed beside `cp`; 2.5 GB beside bitsandbytes
processes 2.5 GB in 5 files by one process of all threads, and by two that share them: seconds, memory of all of them
kill      runs of quantize and merge killed with SIGKILL: does the same call come to the same bytes?
interop   SmolLM2 from nybble to bitsandbytes and back: the same perplexity?
load      a 1 GB NF4 checkpoint: time and memory, one process and two
merge     perplexity of a LoRA on SmolLM2, merged in each way
answer    the merged model as GGUF, asked in llama.cpp

Needs Linux, and for quantize 20 GB of disk. --work: where files are made; they are kept for the next command, but for
the 8.6 GB. By default they are made in a temporary directory and removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import checkpoints_smollm2 as smollm2
import harness
from checkpoints_files import LARGE, PART, TINY, copy, drop_caches, read, seconds, size, write
from checkpoints_worker import TOOLS, Worker
from rich.console import Console
from rich.table import Table

import nybble

Row = dict[str, object]
CEILING = 512e6
SHARE = 250e6  # of an output file where processes share them
NAMES = dict(zip(TOOLS, ("nybble.load", "nybble.load_into", "transformers + bitsandbytes"), strict=True))


def quantize(args: argparse.Namespace) -> list[Row]:
    """Each after the caches were emptied, the order turned around every round."""
    work = args.work
    source, out = work / "large", work / "out"
    print(f"writing {source} ...", file=sys.stderr)
    write(source, LARGE, shards=5)
    contestants: dict[str, Callable[[], Row]] = {
        "cp": lambda: {"seconds": seconds(lambda: copy(source, out))},
        "nybble.quantize, 512MB": lambda: quantized("nybble", source, out, max_memory=CEILING),
    }
    rows = [{"what": "read alone", **from_disk(source, lambda: {"seconds": seconds(lambda: read(source))})}]
    for turn in range(args.rounds):
        for what in list(contestants)[:: -1 if turn % 2 else 1]:
            rows.append({"what": what, **from_disk(source, contestants[what])})
            shutil.rmtree(out)
    shutil.rmtree(source)
    part = write(work / "part", PART)
    for tool, what in (("nybble", "nybble.quantize"), ("bitsandbytes", NAMES["bitsandbytes"])):
        rows.append({"what": what, **from_disk(part, lambda tool=tool: quantized(tool, part, out))})
        shutil.rmtree(out)
    return rows


def from_disk(source: Path, call: Callable[[], Row]) -> Row:
    """One run of a contestant, which begins with nothing in memory."""
    drop_caches(source)
    row = call()
    return {"source, GB": size(source) / 1e9, "GB/s": size(source) / 1e9 / row["seconds"], **row}


def quantized(tool: str, source: Path, out: Path, **options: float) -> Row:
    """Time and peaks of a process that quantizes."""
    with Worker(tool) as worker:
        result = worker("quantize", source, out, **options)
    peaks = {
        "peak added, MB": "rss",
        "of it anonymous, MB": "anon",
        "file pages, MB": "file",
        "peak in all, MB": "peak",
    }
    return {"seconds": result["seconds"], **{name: result[key] / 1e6 for name, key in peaks.items()}}


def processes(args: argparse.Namespace) -> list[Row]:
    """Two processes on one machine: what their start and libraries cost, since threads share its cores already."""
    part, out = write(args.work / "part", PART), args.work / "out"
    settings = {"one process": (1, {}), "two processes": (2, {}), "two, 512MB": (2, {"max_memory": CEILING})}
    rows = []
    for turn in range(args.rounds):
        for what in list(settings)[:: -1 if turn % 2 else 1]:
            count, options = settings[what]
            rows.append({"what": what, **from_disk(part, lambda c=count, o=options: spread(part, out, c, o))})
            shutil.rmtree(out)
    return rows


def spread(source: Path, out: Path, count: int, options: dict[str, float]) -> Row:
    """One run with `count` processes."""
    with Worker("nybble") as worker:
        result = worker("quantize_together", source, out, processes=count, max_shard_size=SHARE, **options)
    return {
        "seconds": result["seconds"],
        "of it to the first weight": result["start"],
        "all processes (Pss), MB": result["pss"] / 1e6,
        "of it beyond libraries, MB": result["added"] / 1e6,
    }


def load(args: argparse.Namespace) -> list[Row]:
    """Processes that have loaded a tiny model before; the file's pages are in the page cache."""
    tiny, part = (made(args.work, name, shape) for name, shape in (("tiny", TINY), ("part", PART)))
    read(part)
    rows, norms = [], {}
    for tool in TOOLS:
        times = []
        for _ in range(args.rounds):
            with Worker(tool) as worker:
                worker("load", tiny)
                times.append(worker("load", part)["seconds"])
        for count in (1, 2):
            found, norm = held(tool, tiny, part, count)
            rows += [{"what": NAMES[tool], "processes": count, **row} for row in found]
            norms[tool] = norm
        rows[-4]["seconds, median"] = statistics.median(times)
    assert norms["nybble"] == norms["load_into"], norms
    print(f"{size(part) / 1e9:.2f} GB; norm of the logits: {norms}")
    return rows


def made(work: Path, name: str, shape: object) -> Path:
    """The directory of an NF4 checkpoint."""
    out = work / f"{name}-nf4"
    if not out.exists():
        nybble.quantize(write(work / name, shape), out)
    return out


def held(tool: str, tiny: Path, part: Path, count: int) -> tuple[list[Row], float]:
    """Memory of each of `count` processes beyond what it had before, after loading and after a forward pass."""
    workers = [Worker(tool) for _ in range(count)]
    try:
        for worker in workers:
            worker("load", tiny)
            worker("forward")
        before = [worker("memory") for worker in workers]
        rows = []
        for moment, command in (("loaded", ("load", part)), ("after a forward pass", ("forward",))):
            for worker in workers:
                worker.send(*command)
            answers = [worker.result() for worker in workers]
            now = [worker("memory") for worker in workers]
            row = {"when": moment, "seconds": max(answer["seconds"] for answer in answers)}
            for name, key in {
                "anonymous, MB": "RssAnon",
                "file pages, MB": "RssFile",
                "its share (Pss), MB": "Pss",
            }.items():
                row[name] = max(after[key] - first[key] for after, first in zip(now, before, strict=True)) / 1e6
            rows.append(row)
    finally:
        for worker in workers:
            worker.__exit__()
    return rows, answers[0]["norm"]


COMMANDS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "quantize": quantize,
    "processes": processes,
    "kill": smollm2.kill,
    "interop": smollm2.interop,
    "load": load,
    "merge": smollm2.merge,
    "answer": smollm2.answer,
}


def show(title: str, rows: list[Row]) -> None:
    """One table, without what is a list."""
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list)))
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if isinstance(rows[-1].get(column), float | int) else "left")
    for row in rows:
        table.add_row(*(cell(row.get(column, "")) for column in columns))
    Console(width=180).print(table, markup=False)


def cell(value: object) -> str:
    """A number with the digits that mean something."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"


def run(commands: dict[str, Callable[[argparse.Namespace], list[Row]]], parser: argparse.ArgumentParser) -> None:
    """Parse, do the command that is asked for or all, show its rows; shared with fidelity.py."""
    parser.add_argument("command", choices=[*commands, "all"])
    parser.add_argument("--work", type=Path, help="directory for files, which are kept")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nybble-bench-") as temporary:
        args.work = args.work or Path(temporary)
        args.work.mkdir(parents=True, exist_ok=True)
        results = {}
        for name in commands if args.command == "all" else [args.command]:
            print(harness.machine_line())
            results[name] = commands[name](args)
            if results[name]:
                show(name, results[name])
        if args.json:
            args.json.write_text(json.dumps({"machine": harness.machine(), **results}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="of each contestant of quantize, loads of load")
    parser.add_argument("--kills", type=int, default=20, help="of each of quantize and merge")
    parser.add_argument("--base", type=Path, help="a directory of `nybble demo`, for merge and answer")
    parser.add_argument("--adapter", type=Path, help="the adapter; by default the base's lora/adapter")
    run(COMMANDS, parser)


if __name__ == "__main__":
    main()
