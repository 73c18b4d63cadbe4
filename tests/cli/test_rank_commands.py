"""`nybble rank`, `extract` and `intrinsic` as a user runs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nybble
from nybble.cli.app import main

pytest.importorskip("transformers")
from tiny import write_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nybble", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return call


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Llama, and the same with its linear layers and a norm changed."""
    base, tuned = write_model(tmp_path / "base"), write_model(tmp_path / "tuned")
    torch.manual_seed(1)
    content = load_file(tuned / "model.safetensors")
    for name, value in content.items():
        if "_proj" in name:
            content[name] = value + torch.outer(torch.randn(value.shape[0]), torch.randn(value.shape[1])) * 0.1
    content["model.norm.weight"] += 0.5
    save_file(content, tuned / "model.safetensors", {"format": "pt"})
    return base, tuned


def test_rank(run: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    status, out, err = run("rank", base, tuned, "--out", tmp_path / "out")
    assert status == 0, err
    for text in ("q_proj", "down_proj", "effective", "stable", "unchanged: model.embed_tokens.weight", "rank.svg"):
        assert text in out
    report = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert [row["rank_99"] for row in report["layers"]] == [1] * 14
    status, out, _ = run("rank", base, tuned, "--json", "--method", "gram")
    assert status == 0 and json.loads(out)["layers"][0]["method"] == "gram"
    status, out, _ = run("rank", base, tuned, "--layers")
    assert status == 0 and "model.layers.1.mlp.up_proj" in out
    status, _, err = run("rank", base, base)
    assert (status, err) == (1, f"error: {base}: BASE and TUNED are the same checkpoint\n")


def test_tables_fit_80_columns(run: Run, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = models
    before, after = (load_file(path / "model.safetensors") for path in models)
    # A small change in bf16, so that the columns about rounding are there.
    small = {name: before[name] + 0.02 * (after[name] - before[name]) for name in before}
    for path, content in ((base, before), (tuned, small)):
        save_file({name: value.bfloat16() for name, value in content.items()}, path / "model.safetensors")
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run("rank", base, tuned)
    header = next(line for line in out.splitlines() if "effective" in line)
    assert status == 0, err
    assert all(name in header for name in ("layers", "full", "|D|/|W|", "stable", "99%", "noise", "above"))
    assert len(header.rstrip()) <= 80 and "embed_tokens" in out


def test_a_bad_destination_is_said_before_the_work(run: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    (tmp_path / "file").write_text("mine")
    for out, text in ((tmp_path / "file", "file is a file"), (tmp_path / "file" / "x", "lies below")):
        for command in (("rank", base, tuned, "--out", out), ("extract", base, tuned, out, "--rank", 2)):
            status, _, err = run(*command)
            assert status == 1 and "error: out: " in err and text in err, err
    assert (tmp_path / "file").read_text() == "mine"


def test_extract(run: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    out_dir, report = tmp_path / "adapter", tmp_path / "report.json"
    status, out, err = run("extract", base, tuned, out_dir, "--rank", 1, "--report", report)
    assert status == 0, err
    assert "14 layers, 2,048 parameters; energy of these layers' changes kept: 100.00%" in out
    assert "warning: 1 changed tensors are not in the adapter: model.norm.weight (|D|/|W| 5.0e-01: not a matrix)" in out
    assert "--save-others" in out and len(json.loads(report.read_text())["rows"]) == 14
    status, out, err = run("extract", base, tuned, out_dir, "--energy", 0.9, "--save-others", "--dtype", "bf16")
    assert status == 0 and "held in full: model.norm" in out and "warning" not in out
    model = nybble.load(base)
    nybble.load_adapter(model, out_dir)
    ids = torch.arange(1, 31)[None]
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, nybble.load(tuned)(input_ids=ids).logits
    assert (found - expected).norm() < 0.02 * expected.norm()  # factors in bf16, right to 2^-9 each
    status, _, err = run("extract", base, tuned, tmp_path / "x")
    assert (status, err) == (1, "error: rank: give a rank, a share of the energy, or both; got neither\n")
    status, _, err = run("extract", base, tuned, tmp_path / "x", "--rank", 1, "--dtype", "fp8")
    assert (status, err) == (1, "error: dtype must be one of fp32, bf16, fp16, got 'fp8'\n")


def test_intrinsic(run: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    rows = [{"text": f"{word} {i}", "label": word} for i in range(20) for word in ("ark", "ox")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = (
        "intrinsic",
        model,
        tmp_path / "data.jsonl",
        tmp_path / "out",
        "--epochs",
        1,
        "--dims",
        "5,50",
        "--rates",
        "1,3",
    )
    status, out, err = run(*command, "--seconds", 0)
    assert status == 0 and "not complete: the same command goes on" in out, err
    status, out, err = run(*command, "--pooling", "last")
    assert status == 0, err
    for text in ("d = 50", "everything", "the head alone", "most frequent class", "32 texts of 2 classes, 8 held out"):
        assert text in out
    assert "90% of full fine-tuning's accuracy" in out
    content = json.loads((tmp_path / "out" / "intrinsic.json").read_text())
    assert content["complete"] and len(content["trials"]) >= 8
    assert content["about"]["model_dir"] == str(model) and content["about"]["max_length"] == 64
    before = (tmp_path / "out" / "intrinsic.json").read_bytes()
    status, _, err = run(*command, "--pooling", "last", "--seed", 1)
    assert status == 1 and "holds a sweep whose seed is 0; give another directory" in err
    assert (tmp_path / "out" / "intrinsic.json").read_bytes() == before
    for options, text in (
        (("--dims", "5,x"), "dims must be positive integers between commas, got '5,x'"),
        (("--rates", "1,x"), "rates must be numbers above 0 between commas, got '1,x'"),
        (("--rates", "0"), "rates must be one or more numbers above 0, got (0.0,)"),
        (("--tune-fraction", 2), "tune_fraction must be a number above 0 and below 1, got 2.0"),
        (("--head", "no"), "head must be 'subspace' or 'trained', got 'no'"),
        (("--val-fraction", 0), "val_fraction must be above 0 without eval_data"),
    ):
        status, _, err = run(*command, *options)
        assert status == 1 and err.startswith(f"error: {text}")
