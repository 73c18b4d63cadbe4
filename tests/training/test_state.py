"""Checkpoints of a run: whole or not there, verified, the one before where one is damaged, an optimizer's every bit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.checkpoint.writer import StorageFullError
from nybble.errors import CheckpointError
from nybble.training import state
from nybble.training.state import Snapshot


def snapshot(step: int, seed: int = 0) -> Snapshot:
    generator = torch.Generator().manual_seed(seed + step)
    tensors = {
        "parameter.a": torch.randn(3, 5, generator=generator).bfloat16(),
        "optimizer.exp_avg.a": torch.randn(3, 5, generator=generator),
        "optimizer.codes.a": torch.randint(0, 256, (15,), generator=generator, dtype=torch.uint8),
        "optimizer.step.a": torch.tensor(float(step)),
        "losses": torch.randn(step, generator=generator, dtype=torch.float64),
    }
    return Snapshot(step, tensors, {"seconds": 0.1 + step, "evaluations": [[0, 1.5, None]]})


def equal(a: Snapshot, b: Snapshot) -> bool:
    same = all(torch.equal(a.tensors[n], b.tensors[n]) and a.tensors[n].dtype == b.tensors[n].dtype for n in a.tensors)
    return a.step == b.step and a.facts == b.facts and a.tensors.keys() == b.tensors.keys() and same


def test_what_is_saved_comes_back_and_only_the_last_are_kept(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        state.save(tmp_path, snapshot(step), keep=2)
    found = state.load(tmp_path)
    assert found.snapshot is not None and equal(found.snapshot, snapshot(12)) and not found.damaged
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000009", "step-00000012"]


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7), file=st.sampled_from([state.TENSORS, state.FACTS]))
def test_any_flipped_bit_is_seen_and_the_one_before_counts(
    tmp_path_factory: Any, place: int, bit: int, file: str
) -> None:
    folder = tmp_path_factory.mktemp("state")
    for step in (3, 6):
        path = state.save(folder, snapshot(step), keep=2)
    content = bytearray((path / file).read_bytes())
    content[place % len(content)] ^= 1 << bit
    (path / file).write_bytes(content)
    found = state.load(folder)
    assert found.snapshot is not None
    if found.snapshot.step == 6:  # JSON that says the same with other bytes (a space for a tab)
        assert file == state.FACTS and equal(found.snapshot, snapshot(6))
        return
    assert equal(found.snapshot, snapshot(3))
    assert len(found.damaged) == 1 and str(path) in found.damaged[0] and "is damaged" in found.damaged[0]


@pytest.mark.parametrize("file", [state.TENSORS, state.FACTS])
@pytest.mark.parametrize("what", ["missing", "empty", "half"])
def test_a_file_that_is_not_whole_is_passed_over(tmp_path: Path, file: str, what: str) -> None:
    for step in (3, 6):
        path = state.save(tmp_path, snapshot(step), keep=2) / file
    content = path.read_bytes()
    path.unlink() if what == "missing" else path.write_bytes(b"" if what == "empty" else content[: len(content) // 2])
    found = state.load(tmp_path)
    assert found.snapshot is not None and equal(found.snapshot, snapshot(3)) and len(found.damaged) == 1


def test_a_newer_state_under_an_older_name_is_not_taken(tmp_path: Path) -> None:
    path = state.save(tmp_path, snapshot(3), keep=2)
    os.rename(path, tmp_path / "step-00000005")
    assert state.load(tmp_path).snapshot is None


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = state.save(tmp_path, snapshot(3), keep=2)
    (path / ".state.json.17.tmp").write_bytes(b"x")
    half = tmp_path / "step-00000006"
    half.mkdir()
    (half / f".{state.TENSORS}.17.tmp").write_bytes(b"x")
    state.clean(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        f"step-00000003/{state.FACTS}",
        f"step-00000003/{state.TENSORS}",
    ]
    assert not half.exists()


def test_a_full_disk_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.checkpoint import writer

    state.save(tmp_path, snapshot(3), keep=1)

    def full(file: Any, data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_all", full)
    with pytest.raises(StorageFullError, match=r"step-00000006"):
        state.save(tmp_path, snapshot(6), keep=1)
    found = state.load(tmp_path).snapshot
    assert found is not None and equal(found, snapshot(3))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def stepped(optimizer: Any, parameters: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    from nybble.training import TrainConfig
    from nybble.training.optimization import make_optimizer, set_learning_rate

    def make() -> tuple[dict[str, torch.nn.Parameter], Any]:
        generator = torch.Generator().manual_seed(0)
        parameters = {
            "x.lora_B": torch.nn.Parameter(torch.randn(96, 64, generator=generator).to(dtype)),
            "y.bias": torch.nn.Parameter(torch.randn(7, generator=generator).to(dtype)),
        }
        config = TrainConfig(optimizer=name, lr=0.01, lora_plus_ratio=4.0, weight_decay=0.1)
        optimizer = make_optimizer(parameters, config)
        set_learning_rate(optimizer, 0.01)
        return parameters, optimizer

    whole, optimizer = make()
    stepped(optimizer, list(whole.values()), range(6))
    first, optimizer = make()
    stepped(optimizer, list(first.values()), range(3))
    tensors, numbers = state.optimizer_state(optimizer, {id(p): n for n, p in first.items()})
    tensors |= {f"parameter.{n}": p.detach() for n, p in first.items()}
    state.save(tmp_path, Snapshot(3, tensors, {"optimizer": numbers}), keep=1)

    found = state.load(tmp_path).snapshot
    assert found is not None
    second, optimizer = make()
    state.copy_into(second, found.tensors, "parameter")
    state.restore_optimizer(optimizer, {id(p): n for n, p in second.items()}, found.tensors, found.facts["optimizer"])
    stepped(optimizer, list(second.values()), range(3, 6))
    for key, parameter in whole.items():
        assert torch.equal(parameter, second[key]), key


def test_a_tensor_that_does_not_fit_is_named() -> None:
    parameter = {"a": torch.zeros(2, 3)}
    with pytest.raises(CheckpointError, match=r"parameter.a: torch.float32 \[2, 3\] is needed, got nothing"):
        state.copy_into(parameter, {}, "parameter")
    with pytest.raises(CheckpointError, match=r"got torch.float32 \[3, 2\]"):
        state.copy_into(parameter, {"parameter.a": torch.ones(3, 2)}, "parameter")
    assert json.dumps(parameter["a"].tolist()) == json.dumps([[0.0] * 3] * 2)
