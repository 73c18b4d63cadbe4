"""`nybble import`: a GGUF file in, a Hugging Face directory out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .export import bar, show


def command(
    src: Annotated[Path, typer.Argument(help="A GGUF file.")],
    dst: Annotated[Path, typer.Argument(help="A new or empty directory.")],
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    pre: Annotated[str | None, typer.Option(help="Name of the pre-tokenizer, if the file's is not known.")] = None,
) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face directory, decoded."""
    from ..checkpoint.gguf import import_gguf

    with bar() as progress:
        report = import_gguf(src, dst, dtype=dtype, pre=pre, progress=progress)
    show(report)


def register(app: typer.Typer) -> None:
    """Add `nybble import`."""
    app.command("import")(command)
