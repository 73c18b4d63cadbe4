"""`nybble eval`: perplexity of a model on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model_dir: Annotated[Path, typer.Argument(help="Directory of the model: quantized by nybble, or a plain one.")],
    text: Annotated[Path, typer.Option(help='A text file, a .jsonl file of {"text": ...}, or a directory of them.')],
    adapter: Annotated[Path | None, typer.Option(help="Adapter directory in PEFT's layout.")] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window; windows do not overlap.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Only the first so many tokens.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Windows in one forward pass.")] = 4,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Print the perplexity of a model on a text: exp of the mean -log p of its tokens, window by window."""
    if not text.exists():
        raise FileNotFoundError(f"{text}: no such file or directory")
    if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}")
    from rich.console import Console
    from rich.progress import Progress

    from ..training.data import to_tokens
    from ..training.evaluate import perplexity
    from .shared import load_model

    model, tokenizer = load_model(model_dir, adapter, device)
    tokens = to_tokens(text, tokenizer, "text")[:max_tokens]
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("evaluating", total=None)
        value = perplexity(
            model,
            tokens,
            window,
            batch_size=batch_size,
            progress=lambda done, windows: progress.update(task, completed=done, total=windows),
        )
    windows = tokens.numel() // window
    typer.echo(f"perplexity {value:.4f}  ({windows} windows of {window} tokens, {tokens.numel()} tokens in the text)")


def register(app: typer.Typer) -> None:
    """Add `nybble eval`."""
    app.command("eval")(command)
