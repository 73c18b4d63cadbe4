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


# Waiting records share a write and a sync, so only the first few of those are sure to come in every run.
SURE = {"journal": 3, "fsync": 6}


def counted(kind: str, die_at: int) -> dict[str, int]:
    """Count every step on the disk, by its kind; step number `die_at` of `kind` is the last moment of this process."""
    from nybble.checkpoint import job, journal, recorder, shard

    count: dict[str, int] = dict.fromkeys(("write", "journal", "fsync", "replace", "unlink"), 0)

    def before(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            if name == kind and count[name] == die_at:
                if name in ("write", "journal") and len(args[1]) > 1:  # half a write is as real as none
                    function(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return step

    shard.write_all = job.write_all = before("write", job.write_all)
    journal.write_all = before("journal", journal.write_all)
    os.fsync, os.replace = before("fsync", os.fsync), before("replace", os.replace)
    os.unlink = before("unlink", os.unlink)
    recorder.SYNC_SECONDS = 0.0
    return count


def in_child(run: Callable[[], None], kind: str = "", die_at: int = -1) -> tuple[int, dict[str, int]]:
    """(exit status as the shell counts, steps on the disk) of `run` in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            count = counted(kind, die_at)
            run()
            os.write(writer, json.dumps(count).encode())
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        steps = pipe.read()
    return os.waitstatus_to_exitcode(status), json.loads(steps or "{}")


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
    assert status == 0, (status, steps)
    whole = digest(folder / "whole")
    choice = [(kind, n) for kind, count in steps.items() for n in range(1, min(count, SURE.get(kind, count)) + 1)]
    same = nothing_final = 0
    for kind, number in random.Random(0).sample(choice, min(points, len(choice))):
        out = folder / f"{kind}{number}"
        status, _ = in_child(run(out), kind, number)
        assert status == -signal.SIGKILL, (kind, number, status)
        if out.exists():
            final = {name: h for name, h in digest(out).items() if not Path(name).name.startswith(".")}
            nothing_final += not final
            assert final.items() <= whole.items(), f"killed at {kind} {number}: {final} is not part of {whole}"
        if not out.exists() or digest(out) != whole:  # after the very last step it is complete already
            status, _ = in_child(run(out))
            assert status == 0, f"killed at {kind} {number}: the same call does not go on"
        same += digest(out) == whole
        shutil.rmtree(out)
    print(json.dumps({"steps": steps, "points": min(points, len(choice)), "same": same, "nothing": nothing_final}))


if __name__ == "__main__":
    main()
