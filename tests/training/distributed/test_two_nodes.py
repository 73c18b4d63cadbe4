"""Two torchrun agents on one machine, as on two: the command line, which writes and speaks once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_process_groups import FP32, assert_same_files, free_port
from tiny import TEXT, write_model
from typer.testing import CliRunner

import nybble
from nybble.cli.app import build

OPTIONS = "--steps 4 --batch-size 4 --seq-len 64 --dtype fp32 --no-plot --eval-every 2 --val-fraction 0.2 --lr 0.01"


def rows(out: Path) -> list[dict[str, object]]:
    kept = ("step", "loss", "tokens")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in kept if key in row} for row in lines if row["kind"] != "config"]


def test_two_agents_train_what_one_process_trains(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    nybble.quantize(tmp_path / "model", tmp_path / "nf4", nybble.QuantConfig())
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["finetune", str(tmp_path / "nf4"), str(tmp_path / "text.txt")]
    agent = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id one --rdzv-endpoint "
    agent += f"127.0.0.1:{free_port()} -m nybble"
    agents = [
        subprocess.Popen(
            [sys.executable, *agent.split(), *command, str(tmp_path / "two"), *OPTIONS.split(), "--parallel", "fsdp"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=240) for process in agents]
    assert not any(process.returncode for process in agents), said
    result = CliRunner().invoke(build(), [*command, str(tmp_path / "one"), *OPTIONS.split()], catch_exceptions=False)
    assert result.exit_code == 0
    assert len(rows(tmp_path / "two")) == 4 + 3
    for found, wanted in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert found == {**wanted, "loss": pytest.approx(wanted["loss"], rel=0, abs=FP32)}
    assert_same_files(tmp_path / "two" / "adapter", tmp_path / "one" / "adapter")
    texts = [output + errors for output, errors in said]
    assert sum("saved in" in text for text in texts) == 1 and sum("held-out perplexity" in text for text in texts) == 1
    assert any("2 processes (fsdp), 2 rows of a batch each" in text for text in texts)
    silent = next(text for text in texts if "saved in" not in text)
    assert not re.search(r"step \d|trainable", silent)
