"""Interrupted runs: killed at any step, out of disk space, two at once, other arguments, damaged leftovers."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_campaign import digest
from safetensors.torch import save_file

import nybble
from nybble import QuantConfig
from nybble.checkpoint import StorageFullError, job, journal, recorder, shard, slabs, task, writer
from nybble.checkpoint.journal import JOURNAL_NAME, BusyError, Journal
from nybble.checkpoint.writer import Staging
from nybble.errors import CheckpointError, DestinationExistsError, LayoutError, NonFiniteError

CAMPAIGN = Path(__file__).parent / "kill_campaign.py"
SHARD = 90_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint without a model class, which spares the runs transformers' import."""
    torch.manual_seed(0)
    directory = tmp_path / "src"
    directory.mkdir()
    weights = {f"layers.{i}.fc.weight": torch.randn(200 + i, 300).bfloat16() for i in range(6)}
    weights |= {f"layers.{i}.norm.weight": torch.randn(300) for i in range(6)}
    save_file(weights, directory / "model.safetensors")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "config.json").write_text('{"architectures": ["None"]}')
    return directory


@pytest.fixture(autouse=True)
def sync_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SYNC_SECONDS", 0.0)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_step_the_same_call_goes_on_to_the_same_bytes(source: Path, tmp_path: Path, workers: int) -> None:
    keywords = {"src": str(source), "dst": "{out}", "max_shard_size": SHARD, "workers": workers}
    points = 30
    command = [sys.executable, CAMPAIGN, "nybble.checkpoint.stream:quantize", json.dumps(keywords), tmp_path, points]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["points"] == result["same"] == points
    assert 0 < result["nothing"] < points  # kills fell before and in the renaming


class Stop(BaseException):
    """Such as KeyboardInterrupt."""


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Let the task with this number raise."""
    original, count = task.Output.check_complete, [0]

    def limited(self: task.Output) -> None:
        original(self)
        count[0] += 1
        if count[0] > after:
            raise error

    monkeypatch.setattr(task.Output, "check_complete", limited)


def test_what_is_done_is_not_done_again_and_the_report_is_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = nybble.quantize(source, tmp_path / "whole", max_shard_size=SHARD)
    with monkeypatch.context() as patch:
        interrupted(patch, 5, Stop())
        with pytest.raises(Stop):
            nybble.quantize(source, tmp_path / "out", max_shard_size=SHARD, workers=1)
    assert not [p for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")]
    report = nybble.quantize(source, tmp_path / "out", max_shard_size=SHARD)
    assert report.resumed == 5
    assert report.tensors == whole.tensors
    assert report.bytes_after == whole.bytes_after
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


IN_THE_DATA = [NonFiniteError("fc", 0, 1, "bad data"), LayoutError("bad data"), CheckpointError("bad data")]


@pytest.mark.parametrize("error", IN_THE_DATA, ids=lambda e: type(e).__name__)
def test_an_error_in_the_data_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    interrupted(monkeypatch, 5, error)
    with pytest.raises(ValueError, match="bad data"):
        nybble.quantize(source, tmp_path / "a" / "out", workers=1)
    assert not (tmp_path / "a").exists()


def allocation_fails(*args: Any) -> Any:
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("what", ["data", "callback", "torch's memory", "max_memory"])
def test_no_error_removes_what_an_earlier_run_did(
    source: Path, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    before = digest(unfinished)
    with monkeypatch.context() as patch:
        if what == "data":
            interrupted(patch, 1, LayoutError("bad data"))
            expected: tuple[type[BaseException], str] = (LayoutError, "bad data")
        elif what == "torch's memory":
            patch.setattr(slabs.Buffer, "take", allocation_fails)
            expected = (
                MemoryError,
                r"'layers\.\d\.fc\.weight': out of memory; the same call goes on from what is done",
            )
        else:
            expected = (
                (CheckpointError, "needs at least") if what == "max_memory" else (RuntimeError, "a callback's bug")
            )
        keywords: dict[str, Any] = {"max_memory": 1e6} if what == "max_memory" else {}
        if what == "callback":
            keywords["progress"] = raising
        with pytest.raises(expected[0], match=expected[1]):
            nybble.quantize(source, unfinished, max_shard_size=SHARD, workers=1, **keywords)
    assert digest(unfinished).keys() == before.keys()
    if what == "max_memory":  # refused before anything is touched
        assert digest(unfinished) == before
    report = nybble.quantize(source, unfinished, max_shard_size=SHARD)
    assert report.resumed >= 5
    nybble.quantize(source, tmp_path / "whole", max_shard_size=SHARD)
    assert digest(unfinished) == digest(tmp_path / "whole")


def raising(done: int, total: int, name: str) -> None:
    raise RuntimeError("a callback's bug")


def test_an_error_outside_the_data_keeps_what_this_run_did(source: Path, tmp_path: Path) -> None:
    def late(done: int, total: int, name: str) -> None:
        if done > total / 2:
            raising(done, total, name)

    with pytest.raises(RuntimeError, match="a callback's bug"):
        nybble.quantize(source, tmp_path / "out", workers=1, progress=late)
    assert nybble.quantize(source, tmp_path / "out").resumed > 0


Call = Callable[[Path], Any]


@pytest.fixture(params=["quantize", "merge"])
def call(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Call:
    """A long piece of work, as a function of its destination: 6 weights in several shards, a config and a tokenizer."""
    if request.param == "quantize":
        return lambda out: nybble.quantize(source, out, max_shard_size=SHARD, workers=1)
    (tmp_path / "adapter").mkdir()
    factors = {f"layers.{i}.fc.lora_{f}": torch.randn(shape) for i in (0, 3) for f, shape in (("A", (2, 300)),)}
    factors |= {f"layers.{i}.fc.lora_B": torch.randn(200 + i, 2) for i in (0, 3)}
    adapter = {f"base_model.model.{name}.weight": value for name, value in factors.items()}
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    return lambda out: nybble.merge(source, tmp_path / "adapter", out, max_shard_size=300_000, workers=1)


def full_at(monkeypatch: pytest.MonkeyPatch, kind: str, number: int) -> None:
    """Let the disk be full at one step: half of that write still gets there."""
    count = 0

    def at(found: str, file: Any, data: Any, original: Callable[..., None]) -> None:
        nonlocal count
        count += found == kind
        if found == kind and count >= number:
            original(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, data)

    def write(file: Any, data: Any) -> None:  # a shard's file is made from a descriptor, a carried one from its path
        at("shard" if isinstance(file.name, int) else "carried", file, data, write_all)

    def append(file: Any, data: Any) -> None:
        at("commit" if b'{"commit"' in data else "journal", file, data, write_all)

    def claim(handle: int, offset: int, size: int) -> None:
        at("claim", handle, range(size), lambda handle, part: fallocate(handle, 0, len(part)))

    def add(self: Any, record: Any, shard: Any) -> None:  # one record a write, so that their number is known
        add_to(self, record, shard)
        while self._error is None and record not in self._journal.records:
            time.sleep(0.001)

    write_all, fallocate, add_to = writer.write_all, os.posix_fallocate, recorder.Recorder.add
    monkeypatch.setattr(recorder.Recorder, "add", add)
    monkeypatch.setattr(job, "write_all", write)
    monkeypatch.setattr(shard, "write_all", write)
    monkeypatch.setattr(journal, "write_all", append)
    monkeypatch.setattr(os, "posix_fallocate", claim)


POINTS = [
    ("journal", 1, False),  # who the run is
    ("claim", 1, False),
    ("claim", 2, False),
    ("shard", 1, False),
    ("journal", 2, False),  # the first weight
    ("journal", 3, True),
    ("shard", 12, True),
    ("carried", 1, True),  # the index
    ("carried", 2, True),
    ("carried", 3, True),  # config.json
    ("commit", 1, True),
]


@pytest.mark.parametrize(("kind", "number", "kept"), POINTS)
def test_a_full_disk_at_any_point(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int, kept: bool
) -> None:
    out, whole = tmp_path / "a" / "out", tmp_path / "whole"
    call(whole)
    with monkeypatch.context() as patch:
        full_at(patch, kind, number)
        with pytest.raises(StorageFullError, match="no space left on device while writing") as caught:
            call(out)
    file = {"journal": JOURNAL_NAME, "commit": JOURNAL_NAME, "carried": ""}.get(kind, "model-0000")
    assert str(caught.value).startswith(f"{out / file}")
    if kept:
        assert re.search(rf"; \d+ weights are done and kept in {out}, the same command goes on", str(caught.value))
        assert all(path.name.startswith(".") for path in out.iterdir())
    else:
        assert str(caught.value).endswith("nothing was left behind")
        assert not out.parent.exists()
    assert (call(out).resumed > 0) is kept
    assert digest(out) == digest(whole)


def test_a_limit_of_file_sizes_is_a_full_disk(call: Call, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, hard))
    try:
        with pytest.raises(StorageFullError, match=r"model.*\.safetensors: file too large"):
            call(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()  # the room is claimed first, so that there is nothing to keep


@pytest.fixture
def unfinished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupted(patch, 5, Stop())
        with pytest.raises(Stop):
            nybble.quantize(source, out, max_shard_size=SHARD, workers=1)
    return out


def test_other_options_or_another_source_are_refused(source: Path, unfinished: Path, tmp_path: Path) -> None:
    before = digest(unfinished)
    with pytest.raises(DestinationExistsError, match=r'options: format was "nf4", is "fp4".*--restart'):
        nybble.quantize(source, unfinished, QuantConfig("fp4"), max_shard_size=SHARD)
    with pytest.raises(DestinationExistsError, match="max_shard_size was 90000, is 1000000"):
        nybble.quantize(source, unfinished, max_shard_size=1e6)
    (source / "tokenizer.json").write_text('{"changed": 1}')
    with pytest.raises(DestinationExistsError, match=r"source: files: tokenizer\.json was"):
        nybble.quantize(source, unfinished, max_shard_size=SHARD)
    assert digest(unfinished) == before
    nybble.quantize(source, unfinished, QuantConfig("fp4"), restart=True)
    nybble.quantize(source, tmp_path / "fresh", QuantConfig("fp4"))
    assert digest(unfinished) == digest(tmp_path / "fresh")


def test_shards_of_the_same_name_in_two_folders_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, names = tmp_path / "src", {}
    for folder in "ab":
        (source / folder).mkdir(parents=True)
        weights = {f"{folder}.{i}.fc.weight": torch.randn(64, 64) for i in range(3)}
        save_file(weights, source / folder / "model.safetensors")
        names.update(dict.fromkeys(weights, f"{folder}/model.safetensors"))
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with monkeypatch.context() as patch:
        interrupted(patch, 2, Stop())
        with pytest.raises(Stop):
            nybble.quantize(source, tmp_path / "out", workers=1)
    for folder in "ab":
        state = (source / folder / "model.safetensors").stat()
        os.utime(source / folder / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        with pytest.raises(DestinationExistsError, match=rf"shards: {folder}/model\.safetensors was"):
            nybble.quantize(source, tmp_path / "out")
        os.utime(source / folder / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert nybble.quantize(source, tmp_path / "out").resumed == 2


def test_a_file_system_without_locks_is_not_a_busy_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"cannot be locked \(No locks available\).*out/\.nybble-journal") as caught:
        nybble.quantize(source, tmp_path / "out")
    assert caught.value.errno == errno.ENOLCK


def test_new_directories_last(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name lasts when its directory is synced: that of every directory made, up to the first that was there."""
    (source / "sub" / "deeper").mkdir(parents=True)
    (source / "sub" / "deeper" / "notes.txt").write_text("x")
    synced: list[Path] = []
    monkeypatch.setattr(writer, "sync_directory", synced.append)
    nybble.quantize(source, tmp_path / "a" / "b" / "out")
    parents = [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    assert synced == [*parents, tmp_path / "a" / "b" / "out", tmp_path / "a" / "b" / "out" / "sub"]
    synced.clear()
    with Staging(tmp_path / "x" / "y") as staging:
        staging.write("z/file", b"")
        staging.commit()
    assert set(synced) == {tmp_path, tmp_path / "x", tmp_path / "x" / "y", tmp_path / "x" / "y" / "z"}


def test_two_runs_at_once(source: Path, unfinished: Path, tmp_path: Path) -> None:
    before = digest(unfinished)
    with Journal(unfinished), pytest.raises(BusyError, match="another run is writing there"):
        nybble.quantize(source, unfinished, max_shard_size=SHARD)
    assert digest(unfinished) == before
    (tmp_path / "new").mkdir()
    with Journal(tmp_path / "new"), pytest.raises(BusyError):
        nybble.quantize(source, tmp_path / "new")


def test_two_processes_at_once(source: Path, tmp_path: Path) -> None:
    """Both begin at the same moment, again and again: one result each time, and the other is told."""
    rounds = 12
    program = textwrap.dedent("""
        import os, sys, time, pathlib, nybble
        source, folder, name, other, rounds = sys.argv[1], pathlib.Path(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5])
        for number in range(rounds):
            (folder / f"{name}{number}").touch()
            while not (folder / f"{other}{number}").exists():
                pass
            time.sleep(0.002 * (number // 4) * (name == "b"))
            try:
                nybble.quantize(source, folder / f"out{number}", workers=1)
                print("done")
            except Exception as error:
                print(type(error).__name__)
    """)
    commands = [[sys.executable, "-c", program, source, tmp_path, a, b, rounds] for a, b in ("ab", "ba")]
    runs = [subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True) for command in commands]
    said = [run.communicate(timeout=300)[0].split() for run in runs]
    assert [len(words) for words in said] == [rounds, rounds]
    nybble.quantize(source, tmp_path / "whole")
    for number, words in enumerate(zip(*said, strict=True)):
        assert sorted(words) in (["BusyError", "done"], ["DestinationExistsError", "done"])
        assert digest(tmp_path / f"out{number}") == digest(tmp_path / "whole")
    assert any("BusyError" in words for words in said)  # they did meet


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "journal"])
def test_damaged_leftovers_are_made_anew(source: Path, unfinished: Path, tmp_path: Path, damage: str) -> None:
    nybble.quantize(source, tmp_path / "whole", max_shard_size=SHARD)
    part = sorted(unfinished.glob(".model*.part"))[0]
    data = bytearray(part.read_bytes())
    if damage == "flip":
        part.write_bytes(bytes(byte ^ 255 for byte in data))
    elif damage == "truncate":
        part.write_bytes(data[:100])
    elif damage == "remove":
        part.unlink()
    else:
        journal = unfinished / JOURNAL_NAME
        journal.write_bytes(journal.read_bytes()[:-30] + b"\n\xff\n")
    report = nybble.quantize(source, unfinished, max_shard_size=SHARD)
    assert report.resumed < 5
    assert digest(unfinished) == digest(tmp_path / "whole")


def test_a_ceiling_too_low_says_what_is_needed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"max_memory: 1,000,000 bytes are too few: .* needs at least [\d,]+"):
        nybble.quantize(source, tmp_path / "out", max_memory=1e6)
    assert not (tmp_path / "out").exists()
