"""`nybble generate` and `nybble chat` as a user runs them, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, write_model
from tiny_models import randomize
from typer.testing import CliRunner

import nybble
from nybble.cli.app import build
from nybble.cli.shared import load_model

pytest.importorskip("tokenizers")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m['role'][0] + ':' + m['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def invoke(*arguments: object, stdin: str = "") -> Any:
    return CliRunner().invoke(
        build(), [str(a) for a in arguments], input=stdin, catch_exceptions=False, env={"COLUMNS": "200"}
    )


def call(*arguments: object, stdin: str = "") -> str:
    result = invoke(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_model(tmp_path_factory.mktemp("tiny") / "model")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Path]:
    found = {}
    for seed, name in enumerate(("one", "two")):
        model = llama()
        nybble.add_lora(model, r=4, alpha=16, name=name)
        randomize(model, name, 0.3, seed)
        found[name] = tmp_path_factory.mktemp("adapters") / name
        nybble.save_adapter(model, found[name], name)
    return found


def text_of(model_dir: Path, prompt: str, adapter: Path | None = None, **options: Any) -> str:
    model, tokenizer = load_model(model_dir, adapter)
    return nybble.generate(model, tokenizer, prompt, max_new_tokens=8, **options)[0].text


def test_one_prompt_is_streamed_and_is_the_text(model_dir: Path) -> None:
    expected = "the small" + text_of(model_dir, "the small") + "\n"
    assert call("generate", model_dir, "the small", "-n", 8) == expected
    assert call("generate", model_dir, "the small", "-n", 8, "--no-stream") == expected


def test_several_prompts_and_adapters_in_one_batch(model_dir: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": "a nybble"}, {"prompt": "x", "adapter": "one"}, {"prompt": "x", "adapter": None}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"--adapter={name}={path}" for name, path in adapters.items()]
    lines = call("generate", model_dir, "every", "-n", 8, "--prompts", file, *given, "--json").splitlines()
    answers = [json.loads(line) for line in lines]
    wanted = [("every", "two"), ("a nybble", "two"), ("x", "one"), ("x", None)]
    assert [(a["prompt"], a["adapter"]) for a in answers] == wanted
    for answer in answers:
        adapter = None if answer["adapter"] is None else adapters[answer["adapter"]]
        assert answer["text"] == text_of(model_dir, answer["prompt"], adapter)
        assert answer["reason"] in ("length", "eos") and answer["tokens"] <= 8
    assert len({a["text"] for a in answers}) > 2
    plain = call("generate", model_dir, "every", "x", "-n", 8)
    assert plain == "".join(f"{p}{text_of(model_dir, p)}\n" for p in ("every", "x"))


def test_settings_reach_the_loop(model_dir: Path) -> None:
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 4}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    sampled = call("generate", model_dir, "a", "-n", 8, *given)
    assert sampled == "a" + text_of(model_dir, "a", **options) + "\n"
    whole = text_of(model_dir, "the small")
    stop = whole[3:5]
    assert (
        call("generate", model_dir, "the small", "-n", 8, "--stop", stop) == f"the small{whole[: whole.index(stop)]}\n"
    )


def test_chat_puts_the_prompt_into_the_template(model_dir: Path) -> None:
    expected = text_of(model_dir, "u:hello\na:")
    assert call("generate", model_dir, "hello", "-n", 8, "--chat") == expected + "\n"


def test_errors_of_generate(model_dir: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prompt"):
        call("generate", model_dir)
    with pytest.raises(ValueError, match="--stream is for one prompt"):
        call("generate", model_dir, "a", "b", "--stream")
    with pytest.raises(ValueError, match="two have the name 'default'"):
        call("generate", model_dir, "a", "--adapter", adapters["one"], "--adapter", adapters["two"])
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        call("generate", model_dir, "--prompts", tmp_path / "none.jsonl")
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: expected an object with a string \"prompt\""):
        call("generate", model_dir, "--prompts", file)
    file.write_text('{"prompt": "a", "adapter": 3}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: adapter must be a name or null"):
        call("generate", model_dir, "--prompts", file)
    file.write_text('{"prompt": "a", "adapter": "none"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: the model has no adapter 'none'; it has none"):
        call("generate", model_dir, "b", "--prompts", file)
    file.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2 is empty: no tokens came out of it"):
        call("generate", model_dir, "--prompts", file)
    file.write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "word " * 2000}) + "\n")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2 has \d+ tokens; the model's context of"):
        call("generate", model_dir, "b", "--prompts", file)
    with pytest.raises(ValueError, match="top_p must be"):
        call("generate", model_dir, "a", "--top-p", 2)


def test_a_conversation_over_a_pipe(model_dir: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    saved = tmp_path / "talk.jsonl"
    begin = f"hello\n\nmore\n/save {saved}\n/reset\n/system be kind\n/adapter one\n"
    stdin = f"{begin}hello\n/save {saved}.2\n/what\n/adapter x\n"
    given = [f"--adapter={name}={path}" for name, path in adapters.items()]
    result = invoke("chat", model_dir, "-n", 8, "--system", "be short", *given, stdin=stdin)
    assert result.exit_code == 0
    first, second = (json.loads(path.read_text())["messages"] for path in (saved, Path(f"{saved}.2")))
    assert [m["role"] for m in first] == ["system", "user", "assistant", "user", "assistant"]
    assert first[0]["content"] == "be short" and [m["content"] for m in first[1::2]] == ["hello", "more"]
    assert second[:2] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    texts = [m["content"] for m in (*first, *second) if m["role"] == "assistant"]
    assert result.stdout == "".join(text + "\n" for text in texts)
    assert texts[0] == text_of(model_dir, "s:be short\nu:hello\na:", adapters["two"])
    assert texts[2] == text_of(model_dir, "s:be kind\nu:hello\na:", adapters["one"])
    assert "error: /what is not known" in result.stderr and "no adapter 'x'" in result.stderr


def test_a_context_that_is_full_is_told_and_the_conversation_goes_on(model_dir: Path) -> None:
    result = invoke("chat", model_dir, "-n", 8, stdin=f"{'x' * 200}\nhello\n")
    assert "the conversation is too long" in result.stderr and "/reset begins anew" in result.stderr
    assert result.stdout == text_of(model_dir, "u:hello\na:") + "\n"


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_stops_an_answer_and_not_the_conversation(model_dir: Path, tmp_path: Path) -> None:
    """The first answer would be of 100 tokens; it is interrupted after its beginning, and the next line is read."""
    program = (
        "import sys, time, torch; torch.set_num_threads(1); import nybble.generation.decoder as d; own = d.Batch.step\n"
        "d.Batch.step = lambda self, tokens: (time.sleep(0.05), own(self, tokens))[1]\n"
        "from nybble.cli.app import main; main()"
    )
    saved = tmp_path / "talk.jsonl"
    command = [sys.executable, "-c", program, "chat", str(model_dir), "-n", "100"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("hello\n")
    process.stdin.flush()
    os.read(process.stdout.fileno(), 1)  # it has begun
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.stdin.write(f"/save {saved}\n")
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert 0 < len(messages[1]["content"]) < 60
