"""`nybble rank`: how low-rank the difference of two checkpoints is."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..planning.rank import RankReport


def command(
    base: Annotated[
        Path, typer.Argument(help="The model before: a directory or a .safetensors file, quantized or not.")
    ],
    tuned: Annotated[Path, typer.Argument(help="The same model after training, or a LoRA adapter for it.")],
    out: Annotated[
        Path | None, typer.Option(help="Write rank.json (all singular values) and rank.svg into this directory.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="A row for every weight, not only every kind.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print rank.json instead of tables.")] = False,
    method: Annotated[
        str, typer.Option(help="svd, gram (eigenvalues of D D^T) or auto: svd up to a shorter side of 2,048.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Singular values of what training changed: effective rank, stable rank, the rank that keeps 90, 95, 99%."""
    import json

    from rich.console import Console

    from ..planning.rank import rank
    from .shared import progress_bar

    if out is not None:
        check_directory("out", out)
    with progress_bar("decomposing") as tick:
        report = rank(base, tuned, device=device, method=method, progress=tick)
    written = [] if out is None else report.write(out)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    console = Console()
    if report.layers:
        console.print(report.layer_table() if layers else report.table())
        console.print(
            "full: the largest possible rank; |D|/|W|: size of the change; 90% ...: rank that keeps so much of |D|^2; "
            "of a kind, means over its layers",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    tell(report, console)
    if written:
        console.print(f"written to {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)
    if out is not None and report.layers and importlib.util.find_spec("matplotlib") is None:
        console.print("no plot: it needs matplotlib (pip install 'nybble[plot]')", markup=False)


def check_directory(option: str, path: Path) -> None:
    """Raises ValueError unless files can be written into `path`, which need not be there: said before hours of work."""
    above = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not above.is_dir():
        where = "" if above == path.absolute() else f"lies below {above}, which "
        raise ValueError(f"{option}: {path} {where}is a file; a directory is needed")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: nothing can be written into {above}; a directory of your own is needed")


def tell(report: RankReport, console: Console) -> None:
    """What is not in the table."""
    lists = {
        "unchanged": report.unchanged,
        "only in BASE": report.missing,
        "only in TUNED": report.extra,
        "of another shape": [f"{name} ({list(a)} and {list(b)})" for name, (a, b) in report.reshaped.items()],
        "tied, counted once": [f"{name} (with {table})" for name, table in report.tied.items()],
    }
    for what, names in lists.items():
        if names:
            console.print(f"{what}: {shorten(names)}", markup=False, highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def shorten(names: list[str], most: int = 6) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def register(app: typer.Typer) -> None:
    """Add `nybble rank`."""
    app.command("rank")(command)
