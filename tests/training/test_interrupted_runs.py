"""A run that is interrupted at any moment goes on to the bits of one that was not."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import TEXT, llama

from nybble import LoRAConfig, QuantConfig, TrainConfig, add_lora, finetune, quantize_
from nybble.errors import DestinationExistsError

TOKENS = torch.tensor(list(TEXT.encode()))
CAMPAIGN = Path(__file__).with_name("kill_campaign.py")
CONFIG = TrainConfig(
    steps=8,
    batch_size=2,
    grad_accum=2,
    seq_len=32,
    lr=1e-2,
    warmup_steps=2,
    dtype="fp32",
    save_every=2,
    eval_every=3,
    val_fraction=0.1,
    optimizer="adamw8bit",
    ema_decay=0.9,
    plot=False,
)


class Stop(Exception):
    """The power cut of these tests."""


def adapted(seed: int = 0) -> Any:
    model = llama(seed=seed)
    quantize_(model, QuantConfig())
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(r=4, alpha=8, dropout=0.2))
    return model


def run(out: Path, config: TrainConfig = CONFIG, stop: int | None = None, model: Any = None, **changes: Any) -> Any:
    def on_step(step: int, loss: float) -> None:
        if step == stop:
            raise Stop

    text = io.StringIO()
    model = adapted() if model is None else model
    console = Console(file=text, width=300)
    try:
        report = finetune(
            model, TOKENS, dataclasses.replace(config, out_dir=out, **changes), on_step=on_step, console=console
        )
    except Stop:
        report = None
    return report, model, text.getvalue()


def result(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (out / "adapter").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "out"
    report, _, _ = run(out)
    return report, result(out)


@pytest.mark.parametrize("stop", range(1, 9))
def test_after_any_step_it_goes_on_to_the_same_bits(tmp_path: Path, whole: Any, stop: int) -> None:
    out = tmp_path / "out"
    assert run(out, stop=stop)[0] is None
    report, _, said = run(out)
    assert report.losses == whole[0].losses
    assert [(e.step, e.loss) for e in report.evaluations] == [(e.step, e.loss) for e in whole[0].evaluations]
    assert result(out) == whole[1]
    last = (stop - 1) // 2 * 2  # the step before was not yet written when the callback of `stop` ran
    assert report.resumed_from == (last or None)
    assert (f"goes on after step {last}" in said) == bool(last)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if row["kind"] == "step"] == whole[0].losses
    assert [row["kind"] for row in rows].count("config") == 1
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "metrics.jsonl"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, whole: Any) -> None:
    out = tmp_path / "out"
    run(out, stop=7)
    newest = out / "checkpoints" / "step-00000006" / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[-3] ^= 16
    newest.write_bytes(content)
    report, _, said = run(out)
    assert f"passed over a checkpoint: {newest}: is damaged" in said and "goes on from step 4" in said
    assert report.resumed_from == 4 and report.losses == whole[0].losses and result(out) == whole[1]


def test_with_every_checkpoint_damaged_it_begins_anew(tmp_path: Path, whole: Any) -> None:
    out = tmp_path / "out"
    run(out, stop=7)
    for mark in out.glob("checkpoints/*/state.json"):
        mark.write_text("{}")
    report, _, said = run(out)
    assert "goes on from the beginning" in said and report.resumed_from is None
    assert report.losses == whole[0].losses and result(out) == whole[1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 2e-2}, r"config\.lr is 0\.02, there 0\.01"),
        ({"seed": 1}, r"config\.seed is 1, there 0"),
        ({"steps": 9}, r"config\.steps is 9, there 8"),
    ],
)
def test_another_run_does_not_go_on_with_this_one(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    out = tmp_path / "out"
    run(out, stop=5)
    before = {str(p): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(DestinationExistsError, match=rf"unfinished run that is not this one: {message}"):
        run(out, **change)
    with pytest.raises(DestinationExistsError, match=r"data is "):
        finetune(adapted(), TOKENS.flip(0), dataclasses.replace(CONFIG, out_dir=out), show=False)
    with pytest.raises(DestinationExistsError, match=r"model is "):
        run(out, model=adapted(seed=5))
    assert {str(p): p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_how_often_it_is_saved_or_logged_may_change(tmp_path: Path, whole: Any) -> None:
    out = tmp_path / "out"
    run(out, stop=5)
    report, _, _ = run(out, save_every=3, log_every=4, keep_checkpoints=1)
    assert report.losses == whole[0].losses and result(out) == whole[1]


def test_a_finished_run_is_not_begun_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out)
    with pytest.raises(DestinationExistsError, match="not empty"):
        run(out)


def test_another_number_of_threads_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, stop=5)
    torch.set_num_threads(2)
    try:
        _, _, said = run(out)
    finally:
        torch.set_num_threads(1)
    assert "threads was 1, is 2" in said and "not to the same bits" in said


def test_killed_at_any_moment_it_comes_to_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(CAMPAIGN), "tiny", str(tmp_path), "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["same"] == counts["points"] == 8, done.stderr
