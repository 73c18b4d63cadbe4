"""out_dir: what a killed process left is taken up or cleared, one run at a time writes there, nothing whole is lost."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXT, llama

from nybble import LoRAConfig, TrainConfig, add_lora, finetune
from nybble.errors import DestinationExistsError
from nybble.training import state
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
