"""`nybble export` and `nybble import` as a user runs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nybble.cli.app import main

pytest.importorskip("gguf")
pytest.importorskip("transformers")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nybble", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return call


def test_out_and_in_again(run, tmp_path: Path) -> None:
    from tiny import write_model

    source, path = write_model(tmp_path / "model"), tmp_path / "model.gguf"
    code, out, _ = run("export", source, path, "--type", "q4_0", "--name", "tiny", "--pre", "gpt-2")
    assert code == 0 and "llama: 20 tensors (14 Q4_0, 5 F32, 1 Q8_0)" in out and f"written to {path}" in out
    code, _, err = run("export", source, path)
    assert code == 1 and "model.gguf: exists already" in err
    code, out, _ = run("import", path, tmp_path / "back", "--dtype", "float32")
    assert code == 0 and f"written to {tmp_path / 'back'}" in out
    code, out, _ = run("generate", tmp_path / "back", "a nybble", "--max-new-tokens", "2")
    assert code == 0 and out.startswith("a nybble")
    code, _, err = run("import", tmp_path / "back" / "config.json", tmp_path / "other")
    assert code == 1 and "config.json: not a GGUF file" in err and not (tmp_path / "other").exists()
    code, _, err = run("export", source, tmp_path / "other.gguf", "--type", "q9")
    assert code == 1 and "type is 'q9'" in err
