"""`nybble finetune`, `eval`, `generate` and `doctor` as a user runs them, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXT, write_model
from typer.testing import CliRunner

import nybble
from nybble.cli import doctor
from nybble.cli.app import build

pytest.importorskip("tokenizers")


def call(*arguments: object) -> str:
    """Standard output of a command that works; an error is raised as it is."""
    result = CliRunner().invoke(build(), [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The model is tiny: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def finetune(*arguments: object) -> str:
    options = ("--steps", 20, "--batch-size", 4, "--seq-len", 32, "--lr", 0.01, "--warmup-steps", 2, "--rank", 4)
    return call("finetune", *arguments, *options)


def found_perplexity(output: str) -> float:
    match = re.search(r"perplexity ([\d.]+)", output)
    assert match is not None, output
    return float(match[1])


def test_the_commands_are_known_without_loading_torch() -> None:
    code = (
        "import sys; from nybble.cli.app import build; build(); print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "nf4"])
def test_finetune_then_eval_and_generate_with_the_adapter(
    quantized: bool, model_dir: Path, text: Path, tmp_path: Path
) -> None:
    if quantized:
        nybble.quantize(model_dir, tmp_path / "nf4")
        model_dir = tmp_path / "nf4"
    out = tmp_path / "out"
    summary = finetune(model_dir, text, out, "--eval-data", text, "--eval-windows", 4)
    assert "held-out perplexity, step 20" in summary and str(out / "loss.png") in summary
    assert (out / "loss.png").is_file()
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "step" for line in steps) == 20

    before = call("eval", model_dir, "--text", text, "--window", 64)
    after = call("eval", model_dir, "--text", text, "--window", 64, "--adapter", out / "adapter")
    assert found_perplexity(after) < 0.5 * found_perplexity(before)
    assert "windows of 64 tokens" in after

    greedy = [call("generate", model_dir, "the small", "--adapter", out / "adapter", "-n", 8) for _ in range(2)]
    assert greedy[0] == greedy[1] and greedy[0].startswith("the small") and len(greedy[0]) > len("the small\n")
    sampled = {call("generate", model_dir, "the", "-n", 8, "-t", 1.0, "--seed", seed) for seed in (1, 1, 2)}
    assert len(sampled) == 2


@pytest.mark.parametrize("method", ["dora", "bottleneck", "prefix", "prompt"])
def test_every_method_trains_from_the_command_line_and_its_adapter_loads(
    method: str, model_dir: Path, text: Path, tmp_path: Path
) -> None:
    nybble.quantize(model_dir, tmp_path / "nf4")
    rate = {"prefix": 0.1, "prompt": 0.1}.get(method, 0.01)
    options = ("--method", method, "--steps", 30, "--batch-size", 4, "--seq-len", 32, "--lr", rate, "--no-plot")
    call("finetune", tmp_path / "nf4", text, tmp_path / "out", *options, "--gradient-checkpointing")
    before = call("eval", tmp_path / "nf4", "--text", text, "--window", 64)
    after = call("eval", tmp_path / "nf4", "--text", text, "--window", 64, "--adapter", tmp_path / "out" / "adapter")
    assert found_perplexity(after) < 0.9 * found_perplexity(before)


def test_full_fine_tuning_leaves_a_model(model_dir: Path, text: Path, tmp_path: Path) -> None:
    options = ("--method", "full", "--steps", 20, "--batch-size", 4, "--seq-len", 32, "--lr", 0.003, "--no-plot")
    before = {p.name: p.read_bytes() for p in model_dir.iterdir()}
    call("finetune", model_dir, text, tmp_path / "out", *options, "--optimizer", "adamw8bit")
    assert {p.name: p.read_bytes() for p in model_dir.iterdir()} == before
    tuned = call("eval", tmp_path / "out" / "adapter", "--text", text, "--window", 64)
    assert found_perplexity(tuned) < 0.5 * found_perplexity(call("eval", model_dir, "--text", text, "--window", 64))
    nybble.quantize(model_dir, tmp_path / "nf4")
    with pytest.raises(ValueError, match="layers are quantized and cannot be trained in full"):
        call("finetune", tmp_path / "nf4", text, tmp_path / "other", *options)


def test_an_interrupted_run_goes_on_with_the_same_command(model_dir: Path, text: Path, tmp_path: Path) -> None:
    arguments = [str(a) for a in (model_dir, text, tmp_path / "out", "--steps", 400, "--seq-len", 32, "--no-plot")]
    command = [sys.executable, "-m", "nybble.cli.app", "finetune", *arguments, "--save-every", "5", "-b", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "out").glob("checkpoints/*/state.json")):
        assert process.poll() is None
    process.kill()
    process.wait()
    summary = call("finetune", *arguments, "--save-every", 100, "-b", 1)
    assert "went on after step" in summary
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (["--rank", "0"], ValueError, "r is 0"),
        (["--method", "magic"], ValueError, "method must be one of lora, .*full, got 'magic'"),
        (["--method", "prefix", "--rank", "4"], ValueError, "rank is an option of lora, dora, not of prefix"),
        (["--packing", "tight"], ValueError, "packing must be 'stream', 'documents' or 'none', got 'tight'"),
        (["--keep-best", "--seq-len", "32"], ValueError, "need held-out data"),
        (["--dtype", "fp8"], ValueError, "dtype must be 'bf16' or 'fp32'"),
        (["--seq-len", "129"], ValueError, r"seq_len=129 .*max_position_embeddings=128"),
        (["--target", "no_such_layer"], ValueError, "no_such_layer"),
        (["--eval-data", "missing.txt"], FileNotFoundError, r"missing\.txt: no such file"),
        (["--lr", "-1"], ValueError, r"lr must be a number above 0, got -1\.0"),
    ],
)
def test_bad_options_of_finetune(
    arguments: list[str], error: type[Exception], message: str, model_dir: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        call("finetune", model_dir, text, tmp_path / "out", "--steps", 1, *arguments)
    assert not (tmp_path / "out").exists()


def test_bad_paths_and_texts(model_dir: Path, text: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match="data is empty"):
        finetune(model_dir, empty, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
        finetune(model_dir, tmp_path / "none.txt", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        finetune(tmp_path / "nowhere", text, tmp_path / "out")
    with pytest.raises(FileExistsError, match="not empty"):
        finetune(model_dir, text, tmp_path)
    with pytest.raises(ValueError, match="text is empty"):
        call("eval", model_dir, "--text", empty)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        call("generate", model_dir, "a", "-n", 0)
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        call("generate", model_dir, "a", "-t", -1)
    with pytest.raises(ValueError, match="prompt is empty"):
        call("generate", model_dir, "")
    with pytest.raises(ValueError, match="no chat template"):
        call("generate", model_dir, "a", "--chat")
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        call("generate", model_dir, "a", "--adapter", tmp_path)


def test_a_model_without_tokenizer_is_named(model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="no tokenizer there"):
        call("generate", tmp_path, "a")


def test_doctor_in_a_process_of_its_own_finds_one_openmp_runtime() -> None:
    command = [sys.executable, "-m", "nybble.cli.app", "doctor", "--shape", "4096,11008", "--m", "16"]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    for name in nybble.isas():
        assert name in result.stdout
    for what in ("active ISA", "threads", "torch", "CUDA in torch", "MPS in torch", "4096, 11008"):
        assert what in result.stdout
    assert "more than one runtime" not in result.stdout
    if sys.platform == "linux":
        assert len(re.findall(r"lib(?:gomp|iomp5|omp)\S*\.so", result.stdout)) == 1


def test_doctor_explains_common_shapes_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    output = call("doctor")
    for n, k in doctor.SHAPES:
        assert output.count(f"{n}, {k} ") == 2 * len(doctor.ROWS)  # forward and grad_input
    monkeypatch.setattr(doctor, "openmp_runtimes", lambda: None)
    assert "unknown on this platform" in call("doctor", "--m", 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "4096"], "shape must be out_features,in_features"),
        (["--shape", "0,5"], "shape must be out_features,in_features"),
        (["--m", "0"], "m must be at least 1"),
        (["--dtype", "int8"], "dtype must be float32, bfloat16 or float16"),
    ],
)
def test_bad_options_of_doctor(arguments: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call("doctor", *arguments)
