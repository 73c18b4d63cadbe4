"""Comparing two models: what is known of equal ones, and what the figures are by their definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import TEXT, llama, write_model
from typer.testing import CliRunner

import nybble
from nybble.cli.app import build
from nybble.training.evaluate import perplexity

TOKENS = torch.randint(1, 256, (200,), generator=torch.Generator().manual_seed(3))


def test_a_model_beside_itself() -> None:
    model = llama()
    found = nybble.compare(model, model, TOKENS, 32)
    assert found.kl == found.kl_99 == 0.0 and found.top1 == 1.0 and found.tokens == 6 * 31
    assert found.perplexity_a == found.perplexity_b == pytest.approx(perplexity(model, TOKENS, 32), rel=1e-5)
    assert [row.relative_error for row in found.layers] == [0.0, 0.0]


def test_figures_are_by_their_definition() -> None:
    a, b = llama(seed=0), llama(seed=1)
    b.load_state_dict({k: v + 0.02 * torch.randn_like(v) for k, v in a.state_dict().items()})
    found = nybble.compare(a, b, TOKENS[:64], 32)
    rows = TOKENS[:64].view(2, 32)
    with torch.no_grad():
        p, q = (torch.log_softmax(m(rows).logits[:, :-1].double(), -1).flatten(0, 1) for m in (a, b))
        hidden = [m(rows, output_hidden_states=True).hidden_states[1].double() for m in (a, b)]
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.kl_99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.perplexity_b == pytest.approx(perplexity(b, TOKENS[:64], 32), rel=1e-5)
    error = float((hidden[0] - hidden[1]).norm() / hidden[0].norm())
    assert found.layers[0].relative_error == pytest.approx(error, rel=1e-4)
    assert nybble.compare(b, a, TOKENS[:64], 32).kl != pytest.approx(found.kl, rel=1e-6)  # it is not symmetric


def test_models_and_texts_that_do_not_go_together() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"vocabulary has 128"):
        nybble.compare(model, llama(vocab_size=128), TOKENS, 32)
    with pytest.raises(ValueError, match="the vocabularies differ: 256 and 300"):
        nybble.compare(model, llama(vocab_size=300), TOKENS, 32)
    with pytest.raises(ValueError, match="fewer than one window"):
        nybble.compare(model, model, TOKENS[:10], 32)
    with pytest.raises(ValueError, match="longer than the model's context"):
        nybble.compare(model, model, TOKENS, 129)


def test_on_the_command_line(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", torch.bfloat16)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    run = CliRunner().invoke
    done = run(
        build(),
        f"quantize {source} {tmp_path / 'q'} --calibrate {text} --samples 4 --seq 64 --report {tmp_path / 'r.json'}",
    )
    assert done.exit_code == 0, done.output
    assert "mean error of outputs, calibrated" in done.output
    rows = json.loads((tmp_path / "r.json").read_text())["tensors"]
    assert all(row["output_error"] < row["output_error_plain"] for row in rows)
    done = run(build(), f"quantize {source} {tmp_path / 'plain'}")
    assert done.exit_code == 0, done.output
    kl = {}
    for name in ("q", "plain"):
        report = tmp_path / f"{name}.json"
        done = run(
            build(),
            f"compare {source} {tmp_path / name} --text {text} --window 64 --report {report}",
        )
        assert done.exit_code == 0, done.output
        assert "same likeliest token" in done.output
        kl[name] = json.loads(report.read_text())["kl"]
        assert report.with_suffix(".png").stat().st_size > 1000
    assert math.isfinite(kl["q"]) and kl["q"] < kl["plain"]
