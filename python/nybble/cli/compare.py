"""`nybble compare`: what one model loses against another on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    a: Annotated[Path, typer.Argument(help="The reference: a model directory, quantized or not.")],
    b: Annotated[Path, typer.Argument(help="The model to judge.")],
    text: Annotated[Path, typer.Option(help='A text file, a .jsonl file of {"text": ...}, or a directory of them.')],
    window: Annotated[int, typer.Option(help="Tokens in a window; windows do not overlap.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Only the first so many tokens.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the figures to this JSON file, and a plot of every block's error beside.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Perplexity of two models on a text, how far their predictions diverge, and the error of every block's output."""
    if not text.exists():
        raise FileNotFoundError(f"{text}: no such file or directory")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from ..calibration.compare import compare
    from ..checkpoint.report import check_report_path
    from ..training.data import to_tokens
    from .shared import load_model

    if report is not None:
        check_report_path(report)
    first, tokenizer = load_model(a, None, device)
    second, other = load_model(b, None, device)
    tokens = to_tokens(text, tokenizer, "text")[:max_tokens]
    if not torch.equal(tokens, to_tokens(text, other, "text")[:max_tokens]):
        raise ValueError(f"{a} and {b} have different tokenizers: their predictions are not of the same tokens")
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("comparing", total=None)
        found = compare(
            first, second, tokens, window, progress=lambda n, total: progress.update(task, completed=n, total=total)
        )
    table = Table(show_header=True)
    for name in ("", str(a), str(b)):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    table.add_row("perplexity", f"{found.perplexity_a:.4f}", f"{found.perplexity_b:.4f}")
    table.add_row("KL divergence, nats a token", "", f"{found.kl:.5f}")
    table.add_row("KL divergence, 99th percentile", "", f"{found.kl_99:.4f}")
    table.add_row("same likeliest token", "", f"{found.top1:.2%}")
    if found.layers:
        worst = max(found.layers, key=lambda row: row.relative_error)
        table.add_row("error of the last block's output", "", f"{found.layers[-1].relative_error:.4f}")
        table.add_row(f"largest, of block {worst.block}", "", f"{worst.relative_error:.4f}")
    output = Console()
    output.print(table)
    output.print(f"{found.tokens} tokens in windows of {window}")
    if report is not None:
        written = found.write(report, (str(a), str(b)))
        output.print(f"written to {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add `nybble compare`."""
    app.command("compare")(command)
