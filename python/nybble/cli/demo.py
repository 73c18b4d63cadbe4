"""`nybble demo`: the main job on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Option(help="Where checkpoints, adapter and plot go; new or empty.")] = Path("demo-out"),
    steps: Annotated[int, typer.Option(help="Optimizer steps of 1,024 tokens.")] = 60,
) -> None:
    """Quantize SmolLM2-135M to NF4, fine-tune it on the King James Bible and show what that did."""
    from ..demo.demo import run

    run(out, steps=steps)


def register(app: typer.Typer) -> None:
    """Add `nybble demo`."""
    app.command("demo")(command)
