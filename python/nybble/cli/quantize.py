"""`nybble quantize`: a checkpoint in, a 4-bit or 8-bit checkpoint out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> float:
    """Bytes from "5GB", "500 MB", "2GiB" or a plain number; ValueError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"size {text!r}: a number with one of B, KB, MB, GB, KiB, MiB, GiB is needed, such as 5GB")
    return float(match[1]) * _UNITS[match[2].upper()]


def command(
    src: Annotated[Path, typer.Argument(help="A .safetensors file or a Hugging Face directory.")],
    dst: Annotated[Path, typer.Argument(help="A new or empty directory.")],
    format: Annotated[str, typer.Option("--format", "-f", help="nf4, fp4, int4 or int8.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64, ... 4096.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales too.")] = True,
    search: Annotated[str, typer.Option(help="How a scale is chosen: absmax or mse.")] = "absmax",
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Name pattern of layers to leave as they are; repeatable.  [default: lm_head]"),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest output file, such as 5GB.")] = "5GB",
) -> None:
    """Quantize the linear layers of a checkpoint, one tensor in memory at a time."""
    limit = parse_size(max_shard_size)
    from rich.console import Console

    from ..checkpoint.stream import quantize
    from ..formats import QuantConfig

    config = QuantConfig(format=format, block_size=block_size, double_quant=double_quant, search=search)
    if skip is not None:
        config = QuantConfig(**{**config.to_dict(), "skip": tuple(skip)})
    report = quantize(src, dst, config, max_shard_size=limit, progress=True)
    console = Console()
    console.print(report.table())
    console.print(f"written to {dst}", markup=False, highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def register(app: typer.Typer) -> None:
    """Add `nybble quantize`."""
    app.command("quantize")(command)
