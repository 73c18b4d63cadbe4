"""`nybble merge`, `unmerge` and `combine` as a user runs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nybble
from nybble.cli.app import main

pytest.importorskip("transformers")
from tiny import TEXT, write_model

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


def test_merge_unmerge_combine(run: Run, tmp_path: Path) -> None:
    base, quantized = write_model(tmp_path / "base"), tmp_path / "nf4"
    nybble.quantize(base, quantized)
    for name in ("a", "b"):
        model = nybble.load(quantized)
        torch.manual_seed(len(name))
        nybble.add_lora(model, nybble.LoRAConfig(r=2, alpha=4))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.02)
        nybble.save_adapter(model, tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    status, out, err = run(
        "merge", quantized, tmp_path / "a", tmp_path / "merged", "--to", "nf4", "--absorb",
        "--report", tmp_path / "r.json", "--text", tmp_path / "text.txt",
        "--window", 64, "--max-memory", "200MB", "--workers", 1,
    )  # fmt: skip
    assert status == 0, err
    for text in ("merged weights", "14", "nf4", "mean error after quantizing again", "perplexity, merged"):
        assert text in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["layers"]) == 14 and set(report["perplexity"]) == {"adapter on its base", "merged"}
    assert run("merge", base, tmp_path / "a", tmp_path / "plain", "--to", "fp32")[0] == 0
    status, out, err = run("unmerge", tmp_path / "plain", tmp_path / "a", tmp_path / "back")
    assert status == 0, err
    ids = torch.arange(30)[None]
    with torch.no_grad():
        before, after = (nybble.load(path)(input_ids=ids).logits for path in (base, tmp_path / "back"))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    status, out, err = run("combine", tmp_path / "ab", f"{tmp_path / 'a'}=0.5", tmp_path / "b", "--rank", 2)
    assert status == 0, err
    assert "14 layers, largest relative error 0." in out
    assert run("combine", tmp_path / "x", f"{tmp_path / 'a'}=half")[2].startswith("error: adapter '")
    status, out, err = run("merge", quantized, tmp_path / "a", tmp_path / "x", "--to", "q8")
    assert (status, err) == (1, "error: to is 'q8'; allowed are bf16, fp16, fp32, nf4, fp4, int4, int8\n")


def test_adapters_that_cannot_be_merged_are_one_line_each(run: Run, tmp_path: Path) -> None:
    for name, tensor in (("base", torch.zeros(8, 8)), ("other", torch.zeros(8, 8))):
        (tmp_path / name).mkdir()
        save_file({"fc.weight": tensor}, tmp_path / name / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')

    def adapter(path: str, value: float) -> Path:
        factors = {"A": torch.full((1, 8), value), "B": torch.ones(8, 1)}
        tensors = {f"base_model.model.{path}.lora_{part}.weight": factor for part, factor in factors.items()}
        save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
        return tmp_path / "adapter"

    cases = [
        ("base", "fc", float("nan"), "fc.lora_A.weight ("),
        ("base", "a.fc", 1.0, "'a.fc': "),
        ("other", "fc", 1.0, "the checkpoint is already quantized (by gptq)"),
    ]
    for base, path, value, text in cases:
        status, _, err = run("merge", tmp_path / base, adapter(path, value), tmp_path / "x", "--to", "fp32")
        assert status == 1 and err.strip().startswith("error: ") and text in err and "\n" not in err.strip()
    assert not (tmp_path / "x").exists()
    status, _, err = run("combine", tmp_path / "x", adapter("fc", float("inf")))
    assert status == 1 and err.strip().startswith("error: ") and "fc.lora_A.weight (" in err
