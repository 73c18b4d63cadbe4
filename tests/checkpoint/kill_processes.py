"""Quantize with several processes again and again, one of them killed each time; used by test_processes.py.

The first run of each destination has 2 or 4 processes, of which one dies by SIGKILL before some step on the disk; it
must end, and say which one died unless that was the first. Then 1, 2 or 4 processes go on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kill_campaign import counted, digest
from killed import in_child

from nybble.checkpoint import processes, stream
from nybble.checkpoint.team import LostProcessError

FORK = multiprocessing.get_context("fork")


class Forks:
    """multiprocessing's context as `processes` uses it, but children are forked, which costs no start of Python."""

    def __init__(self, victim: int, die_at: int) -> None:
        self._victim, self._die_at = victim, die_at
        self._ends: list[Any] = []  # of the parent's, which a spawned child would not have
        self.ranks: list[int] = []

    def Pipe(self) -> Any:
        here, there = multiprocessing.Pipe()
        self._ends.append(here)
        return here, there

    def Process(self, target: Callable[..., None], args: tuple[Any, ...], name: str, daemon: bool) -> Any:
        def run() -> None:
            for end in self._ends:
                end.close()
            if args[1] == self._victim:
                counted("any", self._die_at)
            target(*args)

        return FORK.Process(target=run, name=name, daemon=daemon)


def several(size: int, victim: int = -1, die_at: int = -1, **keywords: Any) -> None:
    """Quantize with `size` processes, forked from this one; that of rank `victim` dies before step `die_at`."""
    processes.multiprocessing.get_context = lambda method: Forks(victim, die_at)
    try:
        stream.quantize(processes=size, **keywords)
    except LostProcessError as error:
        Path(f"{keywords['dst']}.said").write_text(str(error))
        os._exit(1)


def main() -> None:
    """argv: the source, a folder for runs, how many, the size of output files."""
    source, folder, points, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

    def run(out: Path, processes: int, victim: int = -1, die_at: int = -1) -> tuple[int, dict[str, int]]:
        keywords = {"src": source, "dst": out, "max_shard_size": size, "workers": 1}
        return in_child(
            lambda: several(processes, victim, die_at, **keywords),
            lambda: counted("any", die_at if victim == 0 else -1),
        )

    status, steps = run(folder / "whole", 1)
    assert status == 0
    whole = digest(folder / "whole")
    draw = random.Random(0)
    killed = same = named = 0
    for number in range(points):
        out, before, after = folder / f"out{number}", draw.choice((2, 4)), draw.choice((1, 2, 4))
        victim = draw.randrange(1, before) if number % 2 else 0
        last = sum(steps.values()) // before * (2 if victim == 0 else 1)  # about as many as that process makes
        die_at = draw.randint(1, last)
        status, _ = run(out, before, victim, die_at)
        killed += status != 0
        what = f"rank {victim} of {before} killed at step {die_at}"
        if victim == 0:
            assert status in (0, -signal.SIGKILL), (what, status)
        elif status:
            said = Path(f"{out}.said").read_text()
            assert said.startswith(f"rank {victim} of {before} processes has ended"), (what, said)
            assert "killed by SIGKILL" in said, (what, said)
            kept = (out / ".nybble-journal").exists()
            assert ("the same command goes on" if kept else "nothing was left behind") in said, (what, said)
            assert kept or not out.exists(), what
            named += 1
        if out.exists():
            final = {name: h for name, h in digest(out).items() if not Path(name).name.startswith(".")}
            assert final.items() <= whole.items(), f"{what}: {final} is not part of {whole}"
        if not out.exists() or digest(out) != whole:
            status, _ = run(out, after)
            assert status == 0, f"{what}: {after} processes do not go on"
        assert digest(out) == whole, f"{what}: {after} processes came to other bytes"
        same += 1
        shutil.rmtree(out)
    print(json.dumps({"points": points, "killed": killed, "named": named, "same": same}))


if __name__ == "__main__":
    main()
