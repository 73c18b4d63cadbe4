"""`nybble plan` as a person calls it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from tiny import TEXT, write_model
from typer.testing import CliRunner

from nybble.cli.app import build


def run(*words: str) -> str:
    result = CliRunner().invoke(build(), ["plan", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_table_names_every_method_and_the_command() -> None:
    text = run("Llama-3.1-8B", "--memory", "24GB")
    for label in ("just prompting, 4-bit", "prompt tuning", "bottleneck", "QLoRA (NF4)", "LoRA (bf16)", "full (fp32)"):
        assert label in text
    assert "8,030,261,248 parameters" in text and "24.00 GB (given" in text
    assert "nybble quantize path/to/Llama-3.1-8B path/to/Llama-3.1-8B-nf4" in text


def test_why_shows_the_arithmetic() -> None:
    text = run("Llama-3.1-8B", "--memory", "24GB", "--why", "qlora")
    assert "4 bits x 6,979,321,856 weights" in text and "3,489,660,928" in text
    assert "moments of a step" in text
    with pytest.raises(ValueError, match="there are prompting-nf4"):
        run("Llama-3.1-8B", "--memory", "24GB", "--why", "magic")


def test_json_has_what_the_table_has() -> None:
    content = json.loads(run("qwen2.5-7b", "--memory", "16GB", "--why", "lora", "--json", "--ranks", "2"))
    assert content["parameters"] == 7_615_616_512 and content["memory"]["bytes"] == 16_000_000_000
    rows = {row["key"]: row for row in content["methods"]}
    assert rows["full"]["fits"] == "no" and rows["qlora"]["commands"][0].startswith("nybble quantize")
    assert sum(rows["qlora"]["memory"]["parts"].values()) == rows["qlora"]["memory"]["bytes"]
    assert [w["checkpointing"] for w in content["why"]["lora"]] == [False, True]
    assert content["ranks"]["qlora"]["ranks"] == 2


def test_this_machines_memory_is_the_default(tmp_path: Path) -> None:
    write_model(tmp_path / "small")
    assert "of this" in run(str(tmp_path / "small"), "--seq", "64")


def test_ranks_have_a_table_of_their_own() -> None:
    text = run("Llama-3.1-405B", "--memory", "80GB", "--device", "cuda", "--ranks", "16", "--why", "qlora")
    assert "16 ranks, fsdp" in text and "received a rank" in text and "/ 16" in text
    assert "no such machine was measured" in text


def test_where_nothing_fits_the_advice_is_printed() -> None:
    text = run("Llama-3.1-70B", "--memory", "24GB")
    assert "no training fits; what would:" in text and "a machine of" in text


@pytest.mark.parametrize(("text", "message"), [("24", "'24' is 24 bytes; say the unit, such as 24GB"), ("0", "24GB")])
def test_memory_without_its_unit_is_no_plan_for_24_bytes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("Llama-3.1-8B", "--memory", text)
    assert "24.00 GB (given" in run("Llama-3.1-8B", "--memory", "24 gb")


def test_rows_are_no_longer_than_the_models_longest_text_unless_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path / "small")  # whose longest text is 128 tokens
    assert "a step of 1 x 128 tokens" in run(str(tmp_path / "small"), "--memory", "4GB")
    longer = run(str(tmp_path / "small"), "--memory", "4GB", "--seq", "256")
    assert "a step of 1 x 256 tokens" in longer and "more than the model's longest text: 128" in longer
    assert "a step of 1 x 2,048 tokens" in run("Llama-3.1-8B", "--memory", "24GB")


def test_the_commands_run_as_they_are_printed(tmp_path: Path) -> None:
    model, text = write_model(tmp_path / "small"), tmp_path / "text.txt"
    text.write_text(TEXT)
    content = json.loads(run(str(model), "--memory", "4GB", "--seq", "32", "--json"))
    done: set[str] = set()
    for row in content["methods"]:
        assert row["commands"], row["key"]
        for line in row["commands"]:
            told = line.replace("TEXT", str(text)).replace("RUN_DIR", str(tmp_path / row["key"])).replace("PROMPT", "a")
            words = shlex.split(told)
            assert words[0] == "nybble"
            if words[1] == "finetune":
                words += ["--steps", "1"]  # as printed it goes through the text once
            if line not in done:
                result = CliRunner().invoke(build(), words[1:], catch_exceptions=False)
                assert result.exit_code == 0, (line, result.output)
            done.add(line)
    assert len(done) == 10  # a model is quantized once
