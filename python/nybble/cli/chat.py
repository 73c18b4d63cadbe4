"""`nybble chat`: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from . import sampling

HELP = """/reset            forget the conversation; the system message stays
/system [TEXT]    another system message, or none
/adapter [NAME]   another adapter, or none
/save FILE        the conversation as a line of {"messages": [...]}, as `nybble finetune` reads it
/help             this list
Ctrl-C stops an answer, Ctrl-D ends."""


def command(
    model_dir: Annotated[Path, typer.Argument(help="Directory of the model: quantized by nybble, or a plain one.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter directory in PEFT's layout, or NAME=DIRECTORY; the last one acts at first."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens of an answer.")] = 512,
    temperature: sampling.Temperature = 0.0,
    top_k: sampling.TopK = 0,
    top_p: sampling.TopP = 1.0,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.RepetitionPenalty = 1.0,
    stop: sampling.Stop = None,
    seed: sampling.Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Talk with a model on its chat template. A line is a message; /help lists what else can be said."""
    from ..generation import Chat, GenerationConfig
    from .generate import load_with_adapters

    config = GenerationConfig(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()), seed
    )
    model, tokenizer, last = load_with_adapters(model_dir, adapter or (), device)
    chat = Chat(model, tokenizer, config, system=system, adapter=last)
    if sys.stdin.isatty():
        typer.echo("Ctrl-D ends, /help lists what else can be said.", err=True)
    for line in _lines():
        if line.startswith("/"):
            _instruction(chat, line)
        elif line.strip():
            _talk(chat, line)


def _lines() -> Iterator[str]:
    """What the user types, line by line, until the end of the input."""
    terminal = sys.stdin.isatty()
    if terminal:
        import contextlib

        with contextlib.suppress(ImportError):  # editing and a history of lines, where there is one
            import readline  # noqa: F401  # importing it is its effect
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            if terminal:
                typer.echo()
            return
        except KeyboardInterrupt:  # a line that was begun is given up
            if not terminal:
                raise
            typer.echo()


def _talk(chat: Any, text: str) -> None:
    from ..training.interrupt import Interrupt
    from .generate import show

    with Interrupt() as interrupt:
        try:
            pieces = chat.send(text)
        except ValueError as error:
            typer.echo(f"error: {error} (/reset begins anew)", err=True)
            return
        for piece in pieces:
            show(piece)
            if interrupt.requested:
                pieces.close()
                break
    show("\n")
    if chat.last.reason in ("length", "context"):
        what = "--max-new-tokens" if chat.last.reason == "length" else "the model's context is full: /reset begins anew"
        typer.echo(f"[cut off: {what}]", err=True)


def _instruction(chat: Any, line: str) -> None:
    name, _, value = line.partition(" ")
    value = value.strip()
    try:
        if name == "/reset":
            chat.reset()
        elif name == "/system":
            chat.system = value or None
        elif name == "/adapter":
            chat.use(value or None)
        elif name == "/save":
            if not value:
                raise ValueError("/save needs a file's name")
            save(chat.messages, Path(value))
            typer.echo(f"written to {value}", err=True)
        elif name == "/help":
            typer.echo(HELP, err=True)
        else:
            typer.echo(f"error: {name} is not known; /help lists what is", err=True)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)


def save(messages: list[dict[str, str]], path: Path) -> None:
    """Write a conversation, whole or not at all; a file that is there is replaced."""
    from ..checkpoint.writer import Staging

    with Staging(path.parent) as staging:
        staging.write(path.name, (json.dumps({"messages": messages}, ensure_ascii=False) + "\n").encode())
        staging.commit()


def register(app: typer.Typer) -> None:
    """Add `nybble chat`."""
    app.command("chat")(command)
