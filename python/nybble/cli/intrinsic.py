"""`nybble intrinsic`: in how many random directions a model must move to learn a classification task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_DIMS = "10,30,100,300,1000,3000,10000,30000,100000,300000,1000000"


def command(
    model_dir: Annotated[Path, typer.Argument(help="Directory of a plain model, an encoder or a decoder.")],
    data: Annotated[Path, typer.Argument(help='Rows {"text", "label"} in a .jsonl file or a directory of them.')],
    out: Annotated[
        Path, typer.Argument(help="Where intrinsic.json and intrinsic.svg go; new, or of a sweep to go on.")
    ],
    dims: Annotated[str, typer.Option(help="Dimensions of the subspaces.")] = _DIMS,
    eval_data: Annotated[Path | None, typer.Option(help="Held-out rows, in the same form as DATA.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Without them, the share of DATA held out, from its end.")] = 0.2,
    epochs: Annotated[float, typer.Option(help="Passes over the texts, of every run.")] = 3.0,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Texts in one forward pass.")] = 32,
    max_length: Annotated[int, typer.Option(help="Tokens of a text; longer ones are cut.")] = 64,
    pooling: Annotated[str, typer.Option(help="What the head reads: mean, cls or last.")] = "mean",
    rates: Annotated[
        str,
        typer.Option(
            help="Learning rates tried for every run, as factors of --step, --lr and (the head alone) --head-lr; 1: no "
            "search."
        ),
    ] = "0.3,1,3",
    tune_fraction: Annotated[
        float, typer.Option(help="Share of the training texts that a tried rate is judged by.")
    ] = 0.1,
    tune_epochs: Annotated[
        float | None, typer.Option(help="Passes over the texts when a rate is tried; as --epochs if not given.")
    ] = None,
    step: Annotated[
        float, typer.Option(help="In a subspace: the learning rate is step / sqrt(d), at most lr * size / d.")
    ] = 16.0,
    lr: Annotated[float, typer.Option(help="Of full fine-tuning.")] = 1e-4,
    head_lr: Annotated[float, typer.Option(help="Of the new head, there and in the linear probe.")] = 1e-2,
    head: Annotated[
        str, typer.Option(help="subspace: the head moves with the rest; trained: in full, beside the subspace.")
    ] = "subspace",
    structure: Annotated[
        bool, typer.Option("--structure", help="SAID: a scale for every block, counted in d.")
    ] = False,
    scale_lr: Annotated[float, typer.Option(help="Of the scales of --structure.")] = 1e-2,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16: autocast.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Of the projection and the order of the texts.")] = 0,
    seconds: Annotated[float | None, typer.Option(help="Begin no further run after so long.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train in random subspaces of d dimensions, in full, and the head alone; report the d that comes near full.

    The same command goes on with the runs that are missing, and with other --dims adds to them.
    """
    import torch
    from rich.console import Console

    from ..planning.intrinsic import IntrinsicConfig, intrinsic
    from ..training.classifier import TextClassifier
    from ..training.data import Labelled
    from .shared import load_model, progress_bar

    config = IntrinsicConfig(
        epochs, batch_size, seed, dtype, step, lr, head_lr, head, structure, scale_lr, parse_rates(rates),
        tune_fraction, tune_epochs,
    )  # fmt: skip
    wanted = parse_dims(dims)
    for path in (data, eval_data):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path}: no such file or directory")
    model, tokenizer = load_model(model_dir, device=device, dtype=torch.float32)
    if eval_data is None:
        train, test = Labelled.read(data, tokenizer, max_length, seed=seed).split(val_fraction)
        if test is None:
            raise ValueError("val_fraction must be above 0 without eval_data")
    else:
        train = Labelled.read(data, tokenizer, max_length, seed=seed)
        test = Labelled.read(eval_data, tokenizer, max_length, train.names, name="eval_data")
    encoder: Any = getattr(model, "base_model", model)
    classifier = TextClassifier(encoder, len(train.names), pooling)
    about = {
        "model_dir": str(model_dir), "data": str(data), "eval_data": None if eval_data is None else str(eval_data),
        "val_fraction": val_fraction, "max_length": max_length, "device": device,
    }  # fmt: skip
    try:
        with progress_bar("training") as tick:
            report = intrinsic(
                classifier, train, test, out, config, dims=wanted, seconds=seconds, progress=tick, about=about
            )
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what was trained is in {out}, and the same command goes on", err=True)
        raise
    console = Console(soft_wrap=True)
    console.print(report.table())
    console.print(
        f"{report.size:,} numbers move with z; {report.texts:,} texts of {report.classes} classes, "
        f"{report.held_out:,} held out",
        highlight=False,
    )
    for reading in report.readings():
        found = "not reached" if reading.d90 is None else f"d90 = {reading.d90:,}"
        between = "" if reading.below is None or reading.d90 is None else f" (not yet at {reading.below:,})"
        console.print(
            f"{reading.what}, {reading.threshold:.1%} ± {reading.error:.1%}: {found}{between}", highlight=False
        )
    if report.unused:
        console.print(f"left out, as the output does not depend on them: {', '.join(report.unused)}", markup=False)
    console.print(f"written to {out}", markup=False, highlight=False)
    if not report.complete:
        console.print("not complete: the same command goes on", highlight=False)


def parse_dims(text: str) -> tuple[int, ...]:
    """Positive integers between commas. Raises ValueError naming --dims."""
    try:
        dims = tuple(int(part.replace("_", "")) for part in text.split(","))
    except ValueError:
        dims = ()
    if not dims or min(dims) < 1:
        raise ValueError(f"dims must be positive integers between commas, got {text!r}")
    return dims


def parse_rates(text: str) -> tuple[float, ...]:
    """Numbers between commas, which `IntrinsicConfig` checks. Raises ValueError naming --rates."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"rates must be numbers above 0 between commas, got {text!r}") from None


def register(app: typer.Typer) -> None:
    """Add `nybble intrinsic`."""
    app.command("intrinsic")(command)
