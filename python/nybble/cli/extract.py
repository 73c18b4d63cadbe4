"""`nybble extract`: what full fine-tuning changed, as a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    base: Annotated[Path, typer.Argument(help="The model before: what the adapter is for, quantized or not.")],
    tuned: Annotated[Path, typer.Argument(help="The same model after training, or a LoRA for it, to cut its rank.")],
    out: Annotated[Path, typer.Argument(help="A directory for the adapter; one that is there is replaced.")],
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Of every layer.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Each layer gets the rank that keeps this share, at most RANK if that is given."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Name pattern of layers; repeatable.  [default: all-linear]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the factors: fp32, bf16 or fp16.")] = "fp32",
    save_others: Annotated[
        bool, typer.Option("--save-others", help="Hold embeddings and norms that changed in full (modules_to_save).")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write the figures of every layer to this JSON file.")] = None,
    method: Annotated[str, typer.Option(help="svd, gram or auto; see nybble rank.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Write the difference of two checkpoints as a PEFT LoRA: every layer's best approximation of a rank."""
    from rich.console import Console

    from ..checkpoint.report import check_report_path
    from ..planning.extract import ALL_LINEAR, DTYPES, extract
    from .rank import check_directory, shorten
    from .shared import progress_bar

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_directory("out", out)
    if report is not None:
        check_report_path(report)
    with progress_bar("decomposing") as tick:
        found = extract(
            base, tuned, out, rank, energy=energy, target=tuple(target or ()) or ALL_LINEAR, dtype=DTYPES[dtype],
            save_others=save_others, device=device, method=method, progress=tick,
        )  # fmt: skip
    if report is not None:
        found.write(report)
    console = Console(soft_wrap=True)
    console.print(found.table())
    console.print(
        f"{len(found.rows)} layers, {found.parameters:,} parameters; energy of these layers' changes kept: "
        f"{found.kept_covered:.2%}, of all changes: {found.kept:.2%}",
        highlight=False,
    )
    if found.saved:
        console.print(f"held in full: {shorten(found.saved)}", markup=False, highlight=False)
    if found.uncovered:
        names = [f"{name} (|D|/|W| {size:.1e}: {why})" for name, (size, why) in found.uncovered.items()]
        hint = "" if save_others else "; --save-others holds what it can in full"
        console.print(
            f"warning: {len(names)} changed tensors are not in the adapter: {shorten(names)}{hint}",
            markup=False, highlight=False,
        )  # fmt: skip
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    written = [out, *(() if report is None else (report,))]
    console.print(f"written to {', '.join(map(str, written))}", markup=False, highlight=False)


def register(app: typer.Typer) -> None:
    """Add `nybble extract`."""
    app.command("extract")(command)
