"""`nybble quantize` as a user runs it, and how the command line reports errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.cli.app import main
from nybble.cli.quantize import parse_size


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def nybble(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs the command line in this process, which spares the import of torch each time."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["nybble", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        return Done(exit.value.code or 0, out, err)  # type: ignore[arg-type]

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "src"
    directory.mkdir()
    torch.manual_seed(0)
    weights = {
        "fc1.weight": torch.randn(64, 64),
        "fc2.weight": torch.randn(64, 64),
        "lm_head.weight": torch.ones(9, 64),
    }
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text('{"hidden_size": 64}')
    return directory


def test_options_reach_the_file_and_the_table_is_printed(nybble: Run, source: Path, tmp_path: Path) -> None:
    done = nybble(
        "quantize", source, tmp_path / "out", "--format", "fp4", "--block-size", 128, "--no-double-quant",
        "--search", "mse", "--exclude", "fc2", "--max-shard-size", "5 KB", "--max-memory", "200MB", "--workers", 2,
        "--report", tmp_path / "report.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("parameters", "8,768", "4,096 (46.7%) in 1 weights", "fp4", "4.250", "mean relative error", "35.1 kB"):
        assert text in done.stdout
    assert "note: " in done.stdout
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["nybble"]
    assert block == {
        "format": "fp4", "block_size": 128, "double_quant": False, "search": "mse", "compute": None,
        "outlier_threshold": None,
        "skip": ["lm_head", "fc2"], "include": [], "overrides": {},
    }  # fmt: skip
    assert (tmp_path / "report.json").is_file() and (tmp_path / "report.png").is_file()
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert "fc1.weight.quant_state.bitsandbytes__fp4" in load_file(shards[0])


def test_errors_are_one_line_without_a_traceback(
    nybble: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {
        ("quantize", tmp_path / "absent", tmp_path / "out"): f"error: {tmp_path / 'absent'}: no such file or directory",
        ("quantize", source, source / "out"): f"error: {source / 'out'}: the destination is the source",
        ("quantize", source, tmp_path / "out", "--format", "nf5"): "error: format is 'nf5'; known formats are nf4, fp4",
        ("quantize", source, tmp_path / "out", "--block-size", 48): "error: block_size is 48; allowed are 32, 64",
        ("quantize", source, tmp_path / "out", "--exclude", "q"): "error: skip: pattern 'q' matches no linear layer",
        ("quantize", source, tmp_path / "out", "--max-shard-size", "5TB"): "error: size '5TB': a number with one of",
        (
            "quantize",
            source,
            tmp_path / "out",
            "--report",
            tmp_path / "r.png",
        ): f"error: report: {tmp_path / 'r.png'} is",
        ("quantize", source, tmp_path / "out", "--report", tmp_path): f"error: report: {tmp_path} is a directory",
    }
    for arguments, message in cases.items():
        done = nybble(*arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("NYBBLE_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["nybble", "quantize", str(tmp_path / "absent"), str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        main()


@pytest.mark.parametrize(
    "config", ['{"quantization_config": 5}', '{"model_type": ["x"]}', '{"architectures": [5]}', "["]
)
def test_a_config_of_other_types_is_one_line_too(nybble: Run, source: Path, tmp_path: Path, config: str) -> None:
    (source / "config.json").write_text(config)
    done = nybble("quantize", source, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {source / 'config.json'}: ")
    assert done.stderr.count("\n") == 1


def test_wrong_usage_exits_with_2(nybble: Run, source: Path) -> None:
    for arguments in (("quantize",), ("quantize", source, "out", "--no-such-option"), ("no-such-command",)):
        done = nybble(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_help_lists_the_commands(nybble: Run) -> None:
    done = nybble("--help")
    assert done.returncode == 0
    for command in ("quantize", "merge", "unmerge", "combine", "finetune", "eval", "generate", "doctor", "demo"):
        assert command in done.stdout


def test_as_a_process_without_heavy_imports() -> None:
    heavy = "{'transformers', 'tokenizers', 'gguf', 'matplotlib', 'peft', 'bitsandbytes'}"
    program = f"import sys, nybble.cli.app as app; app.build(); print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], "heavy packages are imported inside the commands"
    command = [sys.executable, "-m", "nybble.cli.app", "quantize", "/no/such/place", "/no/such/other"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "error: /no/such/place: no such file or directory (a local checkpoint is needed)\n"


def test_formats_by_pattern(nybble: Run, source: Path, tmp_path: Path) -> None:
    done = nybble(
        "quantize", source, tmp_path / "out", "--override", "fc1=int8", "--override", "fc2=keep",
        "--override", "lm_head=fp4,block_size=32,double_quant=false", "--include", "fc1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    keys = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {"fc1.SCB", "fc2.weight", "lm_head.weight.quant_state.bitsandbytes__fp4"} <= keys
    assert not {"fc2.SCB", "fc2.weight.absmax", "lm_head.weight.nested_absmax"} & keys
    for text in ("fc1", "=nf4", "fc1=", "fc1=nf4,block_size", "fc1=nf4,double_quant=maybe", "fc1=block_size=32"):
        failed = nybble("quantize", source, tmp_path / "x", "--override", text)
        assert failed.returncode == 1
        assert failed.stderr.startswith(f"error: override '{text}'")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5e9), ("500 mb", 5e8), ("2GiB", 2**31), ("1.5KB", 1500.0), ("123", 123.0), ("7B", 7.0)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 G B", "5XB", "1e9", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="a number with one of"):
        parse_size(text)
