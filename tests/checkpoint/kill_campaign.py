"""Quantize (or run another command) again and again, each time killed at another moment; used by test_resume.py.

A process that has done nothing but imports forks one child a run, so that a run costs no start of Python. The child
counts its steps on the disk (writes, syncs, renames, removals) and kills itself with SIGKILL before the given one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def digest(directory: Path) -> dict[str, str]:
    """Every file below `directory`, hidden ones included, with its hash."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def counted(die_at: int) -> list[int]:
    """Make every step on the disk count, and the one with number `die_at` the last moment of this process."""
    from nybble.checkpoint import job, journal

    count = [0]

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == die_at:
                if function is write and len(args[1]) > 1:  # half a write is as real as none
                    function(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return step

    write = job.write_all
    job.write_all = journal.write_all = before(write)
    os.fsync, os.replace, os.unlink = before(os.fsync), before(os.replace), before(os.unlink)
    job.SYNC_SECONDS = 0.0
    return count


def in_child(run: Callable[[], None], die_at: int = -1) -> tuple[int, int]:
    """(exit status as the shell counts, steps on the disk) of `run` in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            count = counted(die_at)
            run()
            os.write(writer, str(count[0]).encode())
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        steps = pipe.read()
    return os.waitstatus_to_exitcode(status), int(steps or 0)


def main() -> None:
    """argv: module:function, its keywords as JSON (with {out} for the destination), folder for runs, kill points."""
    where, keywords, folder, points = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    module, _, name = where.partition(":")
    function = getattr(importlib.import_module(module), name)
    with contextlib.suppress(ImportError):  # here, so that no run has to
        importlib.import_module("transformers").AutoConfig.for_model("llama")

    def run(out: Path) -> Callable[[], None]:
        return lambda: function(**json.loads(keywords.replace("{out}", str(out))))

    status, steps = in_child(run(folder / "whole"))
    assert status == 0 and steps > 0, (status, steps)
    whole = digest(folder / "whole")
    same = early = killed = 0
    for point in sorted(random.Random(0).sample(range(1, steps + 1), min(points, steps))):
        out = folder / f"killed{point}"
        status, _ = in_child(run(out), die_at=point)
        # Records that wait are written together, so some runs have fewer steps than the first one.
        assert status in (0, -signal.SIGKILL), (point, status)
        killed += status != 0
        if out.exists():
            final = {name: h for name, h in digest(out).items() if not Path(name).name.startswith(".")}
            early += not final
            assert final.items() <= whole.items(), f"killed at step {point}: {final} is not part of {whole}"
        if digest(out) != whole:  # killed after the very last step, it is complete already
            status, _ = in_child(run(out))
            assert status == 0, f"killed at step {point}: the same call does not go on"
        same += digest(out) == whole
        shutil.rmtree(out)
    print(
        json.dumps(
            {"steps": steps, "points": min(points, steps), "same": same, "killed": killed, "nothing_final": early}
        )
    )


if __name__ == "__main__":
    main()
