"""`nybble quantize`: a checkpoint in, a 4-bit or 8-bit checkpoint out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..calibration.settings import SAMPLES, SEQ, Rounding
from .processes import ProcessesOption, in_processes

_ROUNDING = Rounding()
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NUMBERS = {"block_size": int}
_SWITCHES = {"double_quant": {"true": True, "false": False}}


def parse_size(text: str) -> float:
    """Bytes from "5GB", "500 MB", "2GiB" or a plain number; ValueError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"size {text!r}: a number with one of B, KB, MB, GB, KiB, MiB, GiB is needed, such as 5GB")
    return float(match[1]) * _UNITS[match[2].upper()]


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """{pattern: override} from "PATTERN=FORMAT[,block_size=N][,double_quant=BOOL][,search=NAME]", or "PATTERN=keep".

    >>> parse_overrides(["down_proj=int8", "q_proj=nf4,block_size=32", "embed_out=keep"])
    {'down_proj': {'format': 'int8'}, 'q_proj': {'format': 'nf4', 'block_size': 32}, 'embed_out': None}
    """
    result: dict[str, Any] = {}
    for text in texts:
        pattern, equals, value = text.partition("=")
        first, *rest = value.split(",")
        if not pattern or not equals or not first or "=" in first:
            raise ValueError(f"override {text!r}: PATTERN=FORMAT or PATTERN=keep is needed, such as 'down_proj=int8'")
        if first == "keep" and not rest:
            result[pattern] = None
            continue
        settings: dict[str, Any] = {"format": first}
        for item in rest:
            key, equals, setting = item.partition("=")
            try:
                settings[key] = _SWITCHES[key][setting] if key in _SWITCHES else _NUMBERS.get(key, str)(setting)
            except (KeyError, ValueError):
                raise ValueError(f"override {text!r}: {item!r} is not a setting with a value") from None
        result[pattern] = settings
    return result


def _with_default(text: str, default: object) -> str:
    """Help of an option that is None unless given, so that it can be refused where it would do nothing."""
    return rf"{text} \[default: {default}]"  # a bare bracket would be rich's markup


def command(
    src: Annotated[Path, typer.Argument(help="A .safetensors file or a Hugging Face directory.")],
    dst: Annotated[Path, typer.Argument(help="A new or empty directory, or one with an unfinished run.")],
    format: Annotated[
        str, typer.Option("--format", "-f", help="nf4, fp4, int4, int8, or learned (with --calibrate).")
    ] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64, ... 4096.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales too.")] = True,
    search: Annotated[
        str,
        typer.Option(
            help="How a scale is chosen: absmax, mse or square. Not of calibrated weights, whose scales are found by "
            "calibration."
        ),
    ] = "absmax",
    include: Annotated[
        list[str] | None, typer.Option(help="Name pattern of the only layers to quantize; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Name pattern of layers to leave as they are, besides lm_head; repeatable."),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN=FORMAT[,block_size=N][,double_quant=false][,search=mse], or PATTERN=keep; repeatable, the "
            "first match wins, also over lm_head and --exclude."
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest output file, such as 5GB.")] = "5GB",
    max_memory: Annotated[
        str | None,
        typer.Option(help="What the processes of a machine may take together, beyond their libraries, such as 512MB."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help=_with_default("Threads of a process.", "the cores, divided by processes"))
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the error of every weight to this JSON file, and a plot beside it.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Round by what the layers do to this text, for a better model in the same files: a text file, a "
            '.jsonl file of {"text": ...}, or a directory of them.'
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help=_with_default("Windows of the text to calibrate on.", SAMPLES))
    ] = None,
    seq: Annotated[int | None, typer.Option(help=_with_default("Tokens in such a window.", SEQ))] = None,
    damping: Annotated[
        float | None,
        typer.Option(
            help=_with_default(
                "Of the second moments: a share of their diagonal's mean is added to it.", _ROUNDING.damping
            )
        ),
    ] = None,
    sweeps: Annotated[
        int | None, typer.Option(help=_with_default("Sweeps of coordinate descent over the codes.", _ROUNDING.sweeps))
    ] = None,
    refits: Annotated[
        int | None, typer.Option(help=_with_default("Times to fit the scales to the codes.", _ROUNDING.refits))
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            help=_with_default(
                "Round columns with large inputs first, else from left to right.",
                "act-order" if _ROUNDING.act_order else "no-act-order",
            )
        ),
    ] = None,
    processes: ProcessesOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished run in DST.")] = False,
) -> None:
    """Quantize the linear layers of a checkpoint, in bounded memory. Interrupted, the same command goes on."""
    limit = parse_size(max_shard_size)
    memory = None if max_memory is None else parse_size(max_memory)
    extent = _given(samples=samples, seq=seq)
    rounding = _given(damping=damping, sweeps=sweeps, refits=refits, act_order=act_order)
    if calibrate is None and (extent or rounding):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in {**extent, **rounding})
        raise ValueError(f"{names}: without --calibrate there is nothing to set; give a text with it")
    from rich.console import Console

    from ..checkpoint.report import check_report_path
    from ..checkpoint.stream import quantize
    from ..formats import QuantConfig

    if report is not None:
        check_report_path(report)
    config = QuantConfig(
        format=format,
        block_size=block_size,
        double_quant=double_quant,
        search=search,
        skip=("lm_head", *(exclude or ())),
        include=tuple(include or ()),
        overrides=parse_overrides(override or ()),
    )
    calibration = None
    if calibrate is not None:
        from ..calibration import Calibration

        calibration = Calibration(calibrate, rounding=Rounding(**rounding), **extent)
    result = in_processes(
        processes,
        lambda count: quantize(
            src,
            dst,
            config,
            max_shard_size=limit,
            max_memory=memory,
            workers=workers,
            restart=restart,
            progress=True,
            calibration=calibration,
            processes=count,
        ),
    )
    console = Console()
    console.print(result.table())
    if result.resumed:
        console.print(f"{result.resumed} tensors were there already from an interrupted run")
    written = [dst, *(result.write(report) if report is not None else ())]
    console.print(f"written to {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def register(app: typer.Typer) -> None:
    """Add `nybble quantize`."""
    app.command("quantize")(command)
