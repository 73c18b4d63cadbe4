"""TensorBoard's files hold what metrics.jsonl does, also after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nybble.training.metrics import MetricsFile

events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_what_is_written_can_be_read_again(tmp_path: Path) -> None:
    path, board = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    metrics = MetricsFile(path, tensorboard=board)
    metrics.write("config", lr=0.1)
    for step in (1, 2, 3):
        metrics.write("step", step=step, loss=4.0 / step, losses={"a": 1.0})
    metrics.write("eval", step=3, loss=2.0, accuracy=0.5)
    metrics.close()
    metrics = MetricsFile(path, after=2, tensorboard=board)  # taken up again after step 2
    metrics.write("step", step=3, loss=1.25)
    metrics.close()

    reader = events.EventAccumulator(str(board))
    reader.Reload()
    found = {(e.step, e.value) for e in reader.Scalars("step/loss")}
    assert found == {(1, 4.0), (2, 2.0), (3, 1.25)}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows if row["kind"] == "step"] == [(1, 4.0), (2, 2.0), (3, 1.25)]
    assert not [row for row in rows if row["kind"] == "eval"]
