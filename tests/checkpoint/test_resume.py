"""Interrupted runs: killed at any step, out of disk space, two at once, other arguments, damaged leftovers."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_campaign import digest
from safetensors.torch import save_file

import nybble
from nybble import QuantConfig
from nybble.checkpoint import StorageFullError, job, slabs, writer
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
    monkeypatch.setattr(job, "SYNC_SECONDS", 0.0)


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
    original, count = job.Output.check_complete, [0]

    def limited(self: job.Output) -> None:
        original(self)
        count[0] += 1
        if count[0] > after:
            raise error

    monkeypatch.setattr(job.Output, "check_complete", limited)


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


@pytest.mark.parametrize("limit", [3_000, 70_000, 100_000, 200_000])
def test_a_full_disk_at_several_points(source: Path, tmp_path: Path, limit: int) -> None:
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StorageFullError, match=r"model.*\.safetensors: file too large"):
            nybble.quantize(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()  # the room is claimed first, so that there is nothing to keep


def test_a_disk_that_fills_up_under_way_keeps_what_is_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written, original = tmp_path / "out", 0, job.write_all
    nybble.quantize(source, tmp_path / "whole", max_shard_size=SHARD)

    def limited(file: Any, data: Any) -> None:
        nonlocal written
        written += len(data)
        if written > 120_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, data)

    monkeypatch.setattr(job, "write_all", limited)
    with pytest.raises(StorageFullError, match=r"no space left .*; \d+ weights are done and kept in .*out, the same"):
        nybble.quantize(source, out, max_shard_size=SHARD)
    assert not [p for p in out.iterdir() if not p.name.startswith(".")]
    monkeypatch.setattr(job, "write_all", original)
    report = nybble.quantize(source, out, max_shard_size=SHARD)
    assert report.resumed > 0
    assert digest(out) == digest(tmp_path / "whole")


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
