"""`nybble export`: a model directory in, a GGUF file for llama.cpp and Ollama out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..checkpoint.gguf.report import GGUFReport, Progress


def command(
    src: Annotated[Path, typer.Argument(help="A Hugging Face directory, quantized or not.")],
    dst: Annotated[Path, typer.Argument(help="The file to write, such as model.gguf.")],
    type: Annotated[str, typer.Option("--type", "-t", help="f32, f16, bf16, q8_0, q4_0 or q4_1.")] = "q8_0",
    name: Annotated[str | None, typer.Option(help="The model's name in the file.  [default: SRC's]")] = None,
    pre: Annotated[str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer, if it isn't found.")] = None,
    context: Annotated[int | None, typer.Option(help="A context length to state, below the model's.")] = None,
) -> None:
    """Write a model directory as a GGUF file, with its tokenizer, for llama.cpp and Ollama."""
    from ..checkpoint.gguf import export_gguf

    with bar() as progress:
        report = export_gguf(src, dst, type, name=name, pre=pre, context=context, progress=progress)
    show(report)


@contextmanager
def bar() -> Iterator[Progress]:
    """A bar on stderr that counts tensors."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total, name: shown.update(task, completed=done, total=total, description=name)


def show(report: GGUFReport) -> None:
    """What was written, and the notes."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    console.print(str(report), markup=False, highlight=False)
    console.print(f"written to {report.destination}", markup=False, highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def register(app: typer.Typer) -> None:
    """Add `nybble export`."""
    app.command("export")(command)
