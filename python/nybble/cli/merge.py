"""`nybble merge`: an adapter into its base, in 16 bits or quantized again; `nybble unmerge`: out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .processes import ProcessesOption, in_processes
from .quantize import parse_size


def command(
    base: Annotated[Path, typer.Argument(help="The directory that the adapter was trained on, quantized or not.")],
    adapter: Annotated[Path, typer.Argument(help="A directory in PEFT's layout.")],
    out: Annotated[Path, typer.Argument(help="A new or empty directory, or one with an unfinished run.")],
    to: Annotated[str, typer.Option(help="bf16, fp16, fp32, nf4, fp4, int4 or int8.")] = "bf16",
    onto: Annotated[
        Path | None, typer.Option(help="Merge onto these original 16-bit weights, not onto the dequantized ones.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Of a quantized result.  [default: the base's]")] = None,
    search: Annotated[str, typer.Option(help="How a scale is chosen: absmax or mse.")] = "absmax",
    absorb: Annotated[
        bool, typer.Option("--absorb", help="Round so that the update survives in a 4-bit result (slower).")
    ] = False,
    text: Annotated[Path | None, typer.Option(help="Held-out text: print perplexity before and after.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window of that text.")] = 512,
    report: Annotated[Path | None, typer.Option(help="Write the figures of every layer to this JSON file.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest output file, such as 5GB.")] = "5GB",
    max_memory: Annotated[
        str | None,
        typer.Option(help="What the processes of a machine may take together, beyond their libraries, such as 512MB."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads of a process.  [default: the cores, divided by processes]")
    ] = None,
    processes: ProcessesOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished run in OUT.")] = False,
) -> None:
    """Merge an adapter into its base, in bounded memory. Interrupted, the same command goes on."""
    if text is not None and not text.exists():
        raise FileNotFoundError(f"{text}: no such file or directory")
    from rich.console import Console

    from ..checkpoint.merging import merge

    limit, memory = parse_size(max_shard_size), None if max_memory is None else parse_size(max_memory)
    result = in_processes(
        processes,
        lambda count: merge(
            base, adapter, out, to, onto=onto, block_size=block_size, search=search, absorb=absorb,
            max_shard_size=limit, max_memory=memory, workers=workers, restart=restart, progress=True, processes=count,
        ),
    )  # fmt: skip
    if text is not None:
        result.perplexity["adapter on its base"] = _perplexity(base, adapter, text, window)
        result.perplexity["merged"] = _perplexity(out, None, text, window)
    console = Console()
    console.print(result.table())
    if report is not None:
        result.write(report)
    written = [out, *(() if report is None else (report,))]
    console.print(f"written to {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def take_out(
    merged: Annotated[Path, typer.Argument(help="A directory of 16- or 32-bit weights that hold the adapter.")],
    adapter: Annotated[Path, typer.Argument(help="A directory in PEFT's layout.")],
    out: Annotated[Path, typer.Argument(help="A new or empty directory, or one with an unfinished run.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest output file, such as 5GB.")] = "5GB",
    max_memory: Annotated[
        str | None,
        typer.Option(help="What the processes of a machine may take together, beyond their libraries, such as 512MB."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads of a process.  [default: the cores, divided by processes]")
    ] = None,
    processes: ProcessesOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished run in OUT.")] = False,
) -> None:
    """Take a merged adapter out again, right up to the rounding of the stored weights."""
    from rich.console import Console

    from ..checkpoint.merging import unmerge

    limit, memory = parse_size(max_shard_size), None if max_memory is None else parse_size(max_memory)
    result = in_processes(
        processes,
        lambda count: unmerge(
            merged, adapter, out, max_shard_size=limit, max_memory=memory, workers=workers, restart=restart,
            progress=True, processes=count,
        ),
    )  # fmt: skip
    console = Console()
    console.print(result.table())
    console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)


def _perplexity(directory: Path, adapter: Path | None, text: Path, window: int) -> float:
    from ..training.data import to_tokens
    from ..training.evaluate import perplexity
    from .shared import load_model

    model, tokenizer = load_model(directory, adapter)
    return perplexity(model, to_tokens(text, tokenizer, "text"), window)


def register(app: typer.Typer) -> None:
    """Add `nybble merge` and `nybble unmerge`."""
    app.command("merge")(command)
    app.command("unmerge")(take_out)
