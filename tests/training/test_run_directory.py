"""out_dir: what a killed process left is taken up or cleared, one run at a time writes there, nothing whole is lost."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import TEXT, llama

from nybble import LoRAConfig, TrainConfig, add_lora, finetune
from nybble.checkpoint.writer import StorageFullError
from nybble.errors import DestinationExistsError
from nybble.training import state
from nybble.training.metrics import MetricsFile
from nybble.training.run_directory import ADAPTER, RUN, RunDirectory
from nybble.training.state import Snapshot

TOKENS = torch.tensor(list(TEXT.encode()))
CONFIG = TrainConfig(steps=2, batch_size=1, seq_len=32, warmup_steps=0, dtype="fp32", plot=False)
WHO = {"config": {"lr": 0.1}}


def adapted() -> Any:
    model = llama()
    add_lora(model, LoRAConfig(r=2, alpha=4))
    return model


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"losses": torch.zeros(step)})


def test_damaged_checkpoints_of_later_steps_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    for step in (6, 8):
        (state.save(tmp_path, snapshot(step), keep=2) / state.TENSORS).write_bytes(b"")
    assert state.load(tmp_path).snapshot is None  # it begins anew
    state.save(tmp_path, snapshot(2), keep=2)
    found = state.load(tmp_path)
    assert found.snapshot is not None and found.snapshot.step == 2 and not found.damaged
    state.save(tmp_path, snapshot(4), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("file", [state.TENSORS, state.FACTS])
def test_a_file_that_the_disk_does_not_give_back_is_damage(tmp_path: Path, file: str) -> None:
    for step in (3, 6):
        path = state.save(tmp_path, snapshot(step), keep=2) / file
    path.unlink()
    path.mkdir()  # reading it is an OSError, as it is of a bad block
    found = state.load(tmp_path)
    assert found.snapshot is not None and found.snapshot.step == 3 and "cannot be read" in found.damaged[0]


def test_killed_while_its_first_file_was_written_it_begins_anew(tmp_path: Path) -> None:
    (tmp_path / f".{RUN}.4711.tmp").write_bytes(b'{"conf')
    RunDirectory(tmp_path, WHO).close()
    assert [p.name for p in tmp_path.iterdir()] == [RUN]


def test_killed_between_two_names_the_results_are_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    RunDirectory(tmp_path, WHO).close()
    state.save(tmp_path / "checkpoints", snapshot(2), keep=1)
    for name in (".adapter.old", ".adapter.partial", ".best.partial", ".best.old", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    (tmp_path / ".loss.png.partial").write_bytes(b"x")
    out = RunDirectory(tmp_path, WHO)
    out.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "best", "checkpoints", RUN]
    assert (tmp_path / "adapter" / "which").read_text() == ".adapter.old"
    assert (tmp_path / "best" / "which").read_text() == "best"


def test_one_run_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    out = RunDirectory(tmp_path, WHO)
    code = (
        "import sys; from pathlib import Path; from nybble.training.run_directory import RunDirectory;"
        "RunDirectory(Path(sys.argv[1]), {'config': {'lr': 0.1}})"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "is in use: another run is writing there" in refused.stderr
    out.close()
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0


def test_a_run_that_came_to_nothing_gives_way_to_another(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):  # in the first step
        finetune(adapted(), TOKENS, dataclasses.replace(CONFIG, out_dir=out), show=False, on_step=lambda *_: 1 // 0)
    report = finetune(adapted(), TOKENS, dataclasses.replace(CONFIG, out_dir=out, batch_size=2), show=False)
    assert report.adapter_dir == out / ADAPTER and report.resumed_from is None


def test_another_run_is_refused_once_there_is_something_to_lose(tmp_path: Path) -> None:
    RunDirectory(tmp_path, WHO).close()
    (tmp_path / ADAPTER).mkdir()
    with pytest.raises(DestinationExistsError, match=r"config\.lr is 0\.2, there 0\.1"):
        RunDirectory(tmp_path, {"config": {"lr": 0.2}})


def test_a_function_that_saves_has_a_directory_to_write_into(tmp_path: Path) -> None:
    def save(model: Any, directory: Path) -> None:
        torch.save({"x": torch.zeros(2)}, directory / "model.pt")

    report = finetune(adapted(), TOKENS, dataclasses.replace(CONFIG, out_dir=tmp_path / "out"), show=False, save=save)
    assert report.adapter_dir is not None and (report.adapter_dir / "model.pt").is_file()


def test_results_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = RunDirectory(tmp_path, WHO)
    did = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        did.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def replaced(a: Any, b: Any) -> None:
        did.append(f"replace {b}")
        replace(a, b)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    out.write(ADAPTER, lambda directory: (directory / "weights").write_bytes(b"1") and None)
    partial, target = tmp_path / ".adapter.partial", tmp_path / ADAPTER
    assert did == [str(partial / "weights"), str(partial), f"replace {target}", str(tmp_path)]
    out.close()


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    out = RunDirectory(tmp_path, WHO)
    out.write(ADAPTER, lambda directory: (directory / "weights").write_bytes(b"1") and None)

    def fail(directory: Path) -> None:
        (directory / "weights").write_bytes(b"2")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        out.write(ADAPTER, fail)
    out.close()
    assert (tmp_path / ADAPTER / "weights").read_bytes() == b"1"
    assert sorted(p.name for p in tmp_path.iterdir()) == [ADAPTER, RUN]


# ---- a full disk -----------------------------------------------------------------------------------------------------


class Disk:
    """Refuses the writes to files whose name `refuse` picks, after half of the data."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuse: Any) -> None:
        from nybble.checkpoint import writer
        from nybble.training import metrics

        write, self.refuse, self.refused = writer.write_all, refuse, 0

        def limited(file: Any, data: Any) -> None:
            if self.refuse(str(file.name)):
                self.refused += 1
                file.write(bytes(data)[: len(data) // 2])  # as much as there was room for
                raise OSError(28, "No space left on device")
            write(file, data)

        monkeypatch.setattr(writer, "write_all", limited)
        monkeypatch.setattr(metrics, "write_all", limited)


FULL = dataclasses.replace(CONFIG, steps=6, save_every=2, eval_every=2, val_fraction=0.1, keep_best=True, out_dir="x")


def say(out: Path, model: Any = None, config: TrainConfig = FULL) -> tuple[Any, str]:
    text = io.StringIO()
    console = Console(file=text, width=300)
    return finetune(
        model or adapted(), TOKENS, dataclasses.replace(config, out_dir=out), console=console
    ), text.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("whole") / "out"
    return say(out)[0].losses, (out / ADAPTER / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("what", ["state.", "best", "metrics"])
def test_a_full_disk_on_the_way_costs_no_trained_step(
    what: str, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, lambda name: what in name.removeprefix(str(tmp_path)))
    out = tmp_path / "out"
    report, said = say(out)
    assert disk.refused and report.losses == whole[0] and ("disk was full" in said or "no space left" in said)
    assert (out / ADAPTER / "adapter_model.safetensors").read_bytes() == whole[1]
    assert not list(out.rglob(".*"))
    if what == "best":
        assert report.best_dir is None and not (out / "best").exists()
    if what == "metrics":
        assert (out / "metrics.jsonl").read_bytes() == b"" and "lacks 11 rows: the disk was full" in said


def test_a_row_that_did_not_fit_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, lambda name: False)
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        disk.refuse = lambda name, step=step: step == 2
        metrics.write("step", step=step)
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3] and metrics.lost == 1


def test_the_adapter_takes_the_room_of_older_checkpoints(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    disk = Disk(monkeypatch, lambda name: ".adapter." in name and len(list(out.glob("checkpoints/*"))) > 1)
    report, _ = say(out)
    assert disk.refused == 1 and report.losses == whole[0]
    assert (out / ADAPTER / "adapter_model.safetensors").read_bytes() == whole[1]


def test_no_room_at_the_very_end_is_told_and_the_same_call_finishes(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    disk = Disk(monkeypatch, lambda name: ".adapter." in name)
    with pytest.raises(StorageFullError, match="make room, and the same call goes on from step-00000006"):
        say(out)
    disk.refuse = lambda name: False
    report, _ = say(out)
    assert report.resumed_from == 6 and report.losses == whole[0]
    assert (out / ADAPTER / "adapter_model.safetensors").read_bytes() == whole[1]
    disk.refuse = lambda name: ".adapter." in name
    with pytest.raises(StorageFullError, match="no adapter was saved; the model itself is trained"):
        say(tmp_path / "other", config=dataclasses.replace(FULL, save_every=0))
