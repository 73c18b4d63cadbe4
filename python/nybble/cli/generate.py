"""`nybble generate`: text after a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model_dir: Annotated[Path, typer.Argument(help="Directory of the model: quantized by nybble, or a plain one.")],
    prompt: Annotated[str, typer.Argument(help="What the model continues.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter directory in PEFT's layout.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Print the prompt and what the model writes after it; with --chat, its answer alone."""
    from ..training.sample import generate_text
    from .shared import load_model

    model, tokenizer = load_model(model_dir, adapter, device)
    text = generate_text(model, tokenizer, prompt, max_new_tokens, temperature=temperature, seed=seed, chat=chat)
    typer.echo(text if chat else prompt + text)


def register(app: typer.Typer) -> None:
    """Add `nybble generate`."""
    app.command("generate")(command)
