"""Quantize (or run another command) again and again, each time killed at another moment; used by test_resume.py.

Each run counts its steps on the disk (writes, syncs, renames, removals) and kills itself with SIGKILL before the given
one.
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
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from killed import Steps, in_child


def digest(directory: Path) -> dict[str, str]:
    """Every file below `directory`, hidden ones included, with its hash."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# Waiting records share a write and a sync, so only the first few of those are sure to come in every run.
SURE = {"journal": 3, "fsync": 6}


def counted(kind: str = "", die_at: int = -1) -> Steps:
    """Count every step on the disk, by its kind; step number `die_at` of `kind` is the last moment of this process."""
    from nybble.checkpoint import job, journal, recorder, shard

    steps = Steps(("write", "journal", "fsync", "replace", "unlink"), kind, die_at)
    shard.write_all = job.write_all = steps.before("write", job.write_all, is_write=True)
    journal.write_all = steps.before("journal", journal.write_all, is_write=True)
    os.fsync, os.replace = steps.before("fsync", os.fsync), steps.before("replace", os.replace)
    os.unlink = steps.before("unlink", os.unlink)
    recorder.SYNC_SECONDS = 0.0
    return steps


def main() -> None:
    """argv: module:function, its keywords as JSON (with {out} for the destination), folder for runs, kill points."""
    where, keywords, folder, points = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    module, _, name = where.partition(":")
    function = getattr(importlib.import_module(module), name)
    with contextlib.suppress(ImportError):  # here, so that no run has to
        importlib.import_module("transformers").AutoConfig.for_model("llama")

    def run(out: Path) -> Callable[[], None]:
        return lambda: function(**json.loads(keywords.replace("{out}", str(out))))

    status, steps = in_child(run(folder / "whole"), counted)
    assert status == 0, (status, steps)
    whole = digest(folder / "whole")
    choice = [(kind, n) for kind, count in steps.items() for n in range(1, min(count, SURE.get(kind, count)) + 1)]
    same = nothing_final = 0
    for kind, number in random.Random(0).sample(choice, min(points, len(choice))):
        out = folder / f"{kind}{number}"
        status, _ = in_child(run(out), partial(counted, kind, number))
        assert status == -signal.SIGKILL, (kind, number, status)
        if out.exists():
            final = {name: h for name, h in digest(out).items() if not Path(name).name.startswith(".")}
            nothing_final += not final
            assert final.items() <= whole.items(), f"killed at {kind} {number}: {final} is not part of {whole}"
        if not out.exists() or digest(out) != whole:  # after the very last step it is complete already
            status, _ = in_child(run(out), counted)
            assert status == 0, f"killed at {kind} {number}: the same call does not go on"
        same += digest(out) == whole
        shutil.rmtree(out)
    print(json.dumps({"steps": steps, "points": min(points, len(choice)), "same": same, "nothing": nothing_final}))


if __name__ == "__main__":
    main()
