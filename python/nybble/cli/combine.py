"""`nybble combine`: a weighted sum of adapters, as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Argument(help="The new adapter's directory.")],
    adapters: Annotated[list[str], typer.Argument(help="DIRECTORY or DIRECTORY=WEIGHT, such as runs/a=0.5.")],
    rank: Annotated[
        int | None, typer.Option(help="Cut every layer's sum to this rank.  [default: exact, the ranks add up]")
    ] = None,
) -> None:
    """Write the adapter whose update is the weighted sum of others'."""
    from rich.console import Console

    from ..checkpoint.combine import combine_adapters

    parts = []
    for text in adapters:
        directory, equals, weight = text.rpartition("=")
        try:
            parts.append((directory, float(weight)) if equals else (text, 1.0))
        except ValueError:
            raise ValueError(f"adapter {text!r}: DIRECTORY=WEIGHT is needed, with a number behind the =") from None
    errors = combine_adapters(parts, out, rank)
    console = Console()
    console.print(f"{len(errors)} layers, largest relative error {max(errors.values()):.4f}")
    console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add `nybble combine`."""
    app.command("combine")(command)
