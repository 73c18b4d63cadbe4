"""`nybble generate`: text after prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import sampling


def command(
    model_dir: Annotated[Path, typer.Argument(help="Directory of the model: quantized by nybble, or a plain one.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What the model continues; several run in one batch.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='More prompts: a .jsonl file of {"prompt": ..., "adapter": NAME}.')
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter directory in PEFT's layout, or NAME=DIRECTORY. May be given several times."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to write.")] = 128,
    temperature: sampling.Temperature = 0.0,
    top_k: sampling.TopK = 0,
    top_p: sampling.TopP = 1.0,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.RepetitionPenalty = 1.0,
    stop: sampling.Stop = None,
    seed: sampling.Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Print text as it is written.  [default: one prompt]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON for each prompt.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Print each prompt and what the model writes after it; with --chat, its answer alone.

    The adapter that is given last acts, or for a prompt of --prompts the one that it names (null: none).
    """
    from ..generation import GenerationConfig
    from ..generation.loop import chat_ids, generate
    from ..generation.loop import stream as pieces

    config = GenerationConfig(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()), seed
    )
    given = prompt or []
    asked = [(f"prompt {number}" if len(given) > 1 else "prompt", text, ...) for number, text in enumerate(given)]
    asked += read_prompts(prompts) if prompts is not None else []
    if not asked:
        raise ValueError("no prompt: give one, or a file of them with --prompts")
    if stream and (as_json or len(asked) > 1):
        raise ValueError("--stream is for one prompt and plain text")
    model, tokenizer, last = load_with_adapters(model_dir, adapter or (), device)
    labels = [label for label, _, _ in asked]
    texts: list[Any] = [text for _, text, _ in asked]
    if chat:
        texts = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    options: Any = {"adapters": [last if name is ... else name for _, _, name in asked], "labels": labels}
    if stream is not False and not as_json and len(asked) == 1:
        source = pieces(model, tokenizer, texts, config, **options)
        show("" if chat else asked[0][1])
        for piece in source:
            show(piece.text)
        show("\n")
        return
    for answer, (_, text, _) in zip(generate(model, tokenizer, texts, config, **options), asked, strict=True):
        if as_json:
            row = {"prompt": text, "adapter": answer.adapter, "text": answer.text, "reason": answer.reason}
            counts = {"prompt_tokens": answer.prompt_tokens, "tokens": len(answer.tokens)}
            show(json.dumps({**row, **counts}, ensure_ascii=False) + "\n")
        else:
            show((answer.text if chat else text + answer.text) + "\n")


def show(text: str) -> None:
    """Print at once, without a new line; characters that the terminal does not know become '?'."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def load_with_adapters(directory: Path, adapters: Any, device: str) -> tuple[Any, Any, str | None]:
    """(model, tokenizer, the name of the last adapter) with adapters given as DIRECTORY or NAME=DIRECTORY.

    Raises:
        ValueError: two of them have one name.
    """
    from ..checkpoint import load_adapter
    from ..nn.adapters import DEFAULT
    from .shared import load_model

    named: dict[str, Path] = {}
    for given in adapters:
        name, equals, path = given.partition("=")
        if not equals or Path(given).is_dir():
            name, path = DEFAULT, given
        if name in named:
            raise ValueError(f"--adapter: two have the name {name!r} ({named[name]}, {path}); give NAME=DIRECTORY")
        named[name] = Path(path)
    model, tokenizer = load_model(directory, None, device)
    for name, path in named.items():
        load_adapter(model, path, name)
    return model.eval(), tokenizer, next(reversed(named), None)


def read_prompts(path: Path) -> list[tuple[str, str, Any]]:
    """(where it stands, prompt, adapter) of each line; the adapter is ... where the line does not say.

    Raises:
        FileNotFoundError: no such file. ValueError: a line that is something else, by its number.
    """
    from ..training.data.read import read_records, shown

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    result: list[tuple[str, str, Any]] = []
    for record in read_records(path):
        value = record.value
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise ValueError(f'{record.where}: expected an object with a string "prompt", got {shown(value)}')
        name = value.get("adapter", ...)
        if name is not ... and name is not None and not isinstance(name, str):
            raise ValueError(f"{record.where}: adapter must be a name or null, got {shown(name)}")
        result.append((record.where, value["prompt"], name))
    if not result:
        raise ValueError(f"{path}: no prompts in it")
    return result


def register(app: typer.Typer) -> None:
    """Add `nybble generate`."""
    app.command("generate")(command)
