"""`nybble finetune`: train an adapter over a model, quantized or not, or the model itself."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.config import TrainConfig
from ..training.methods import Method

_HELP = {field.name: field.metadata["help"] for field in (*fields(TrainConfig), *fields(Method))}


def _option(field: str, *names: str) -> Any:
    return typer.Option(*names, help=_HELP[field])


def command(
    model_dir: Annotated[Path, typer.Argument(help="Directory of the model: quantized by nybble, or a plain one.")],
    data: Annotated[
        Path,
        typer.Argument(
            help="A text file, a .jsonl file (text, prompt and completion, messages, ...), or a directory of them."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="Where adapter/, metrics.jsonl and loss.png go; new, or of a run to go on.")
    ],
    method: Annotated[str, _option("name")] = Method.name,
    rank: Annotated[int, _option("rank", "--rank", "-r")] = Method.rank,
    alpha: Annotated[float, _option("alpha")] = Method.alpha,
    dropout: Annotated[float, _option("dropout")] = Method.dropout,
    rslora: Annotated[bool, _option("rslora")] = Method.rslora,
    target: Annotated[list[str] | None, _option("target")] = None,
    size: Annotated[int, _option("size")] = Method.size,
    placement: Annotated[str, _option("placement")] = Method.placement,
    tokens: Annotated[int, _option("tokens")] = Method.tokens,
    projection: Annotated[bool, _option("projection")] = Method.projection,
    prompt_text: Annotated[str | None, _option("prompt_text")] = Method.prompt_text,
    steps: Annotated[int | None, _option("steps")] = TrainConfig.steps,
    epochs: Annotated[float | None, _option("epochs")] = TrainConfig.epochs,
    batch_size: Annotated[int, _option("batch_size", "--batch-size", "-b")] = TrainConfig.batch_size,
    grad_accum: Annotated[int, _option("grad_accum")] = TrainConfig.grad_accum,
    seq_len: Annotated[int, _option("seq_len")] = TrainConfig.seq_len,
    packing: Annotated[str, _option("packing")] = TrainConfig.packing,
    optimizer: Annotated[str, _option("optimizer")] = TrainConfig.optimizer,
    lr: Annotated[float, _option("lr")] = TrainConfig.lr,
    lora_plus_ratio: Annotated[float, _option("lora_plus_ratio")] = TrainConfig.lora_plus_ratio,
    schedule: Annotated[str, _option("schedule")] = TrainConfig.schedule,
    warmup_steps: Annotated[int, _option("warmup_steps")] = TrainConfig.warmup_steps,
    min_lr_ratio: Annotated[float, _option("min_lr_ratio")] = TrainConfig.min_lr_ratio,
    weight_decay: Annotated[float, _option("weight_decay")] = TrainConfig.weight_decay,
    max_grad_norm: Annotated[float, _option("max_grad_norm")] = TrainConfig.max_grad_norm,
    ema_decay: Annotated[float, _option("ema_decay")] = TrainConfig.ema_decay,
    gradient_checkpointing: Annotated[bool, _option("gradient_checkpointing")] = TrainConfig.gradient_checkpointing,
    low_memory: Annotated[bool, _option("low_memory")] = TrainConfig.low_memory,
    dtype: Annotated[str, _option("dtype")] = TrainConfig.dtype,
    eval_data: Annotated[Path | None, typer.Option(help="Held-out data, in the same forms as DATA.")] = None,
    val_fraction: Annotated[float, _option("val_fraction")] = TrainConfig.val_fraction,
    eval_every: Annotated[int, _option("eval_every")] = TrainConfig.eval_every,
    eval_windows: Annotated[int | None, _option("eval_windows")] = TrainConfig.eval_windows,
    early_stopping: Annotated[int, _option("early_stopping")] = TrainConfig.early_stopping,
    keep_best: Annotated[bool, _option("keep_best")] = TrainConfig.keep_best,
    save_every: Annotated[int, _option("save_every")] = TrainConfig.save_every,
    log_every: Annotated[int, _option("log_every")] = TrainConfig.log_every,
    seed: Annotated[int, _option("seed")] = TrainConfig.seed,
    plot: Annotated[bool, _option("plot")] = TrainConfig.plot,
    parallel: Annotated[str, _option("parallel")] = TrainConfig.parallel,
    tensorboard: Annotated[bool, _option("tensorboard")] = TrainConfig.tensorboard,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Fine-tune a model on text and save what was trained. The same command again goes on with an interrupted run.

    In several processes: torchrun --nproc-per-node N -m nybble finetune ...
    """
    given = dict(locals())
    import torch

    from ..training.distributed.launch import joined, launched_rank, local_device
    from ..training.loop import finetune
    from ..training.methods import apply
    from .shared import load_model

    full, shown = method == "full", launched_rank() == 0
    names = {field.name for field in fields(TrainConfig)}
    with joined(parallel, local_device(device)) as world:
        with world.together():
            targets = tuple(target or ())
            sizes = (rank, alpha, dropout, rslora, targets, size, placement, tokens, projection, prompt_text)
            chosen = Method(method, *sizes)
            # Weights that are trained themselves are kept in fp32: steps are smaller than bf16 can add.
            config = TrainConfig(
                out_dir=out, fp32_weights=full, **{name: value for name, value in given.items() if name in names}
            )
            for path in (data, eval_data):
                if path is not None and not path.exists():
                    raise FileNotFoundError(f"{path}: no such file or directory")
            model, tokenizer = load_model(model_dir, device=local_device(device))
            torch.manual_seed(seed)  # the adapter's first values
            prepared = apply(model, chosen, tokenizer)
        if shown:
            typer.echo(f"method {chosen.name}: {prepared}", err=True)
        save = _whole_model(tokenizer) if full else None
        report = finetune(model, data, config, tokenizer=tokenizer, eval_data=eval_data, save=save)
    if shown:
        _print_summary(report, goes_on=bool(save_every))
    if report.interrupted:
        raise typer.Exit(130)


def _whole_model(tokenizer: Any) -> Any:
    """Saves the model itself, with its tokenizer, as transformers does."""

    def save(model: Any, directory: Path) -> None:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return save


def _print_summary(report: Any, goes_on: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..training.metrics import format_memory

    table = Table(show_header=False)
    table.add_row("steps", f"{len(report.losses):,}" + _ending(report, goes_on))
    table.add_row("loss, first and last step", f"{report.losses[0]:.4f}  {report.losses[-1]:.4f}")
    for evaluation in report.evaluations:
        table.add_row(f"held-out perplexity, step {evaluation.step}", f"{evaluation.perplexity:.3f}")
    table.add_row("tokens/s", f"{report.tokens_per_second:,.0f}")
    table.add_row("peak memory", format_memory(report.peak_memory_bytes))
    if report.resumed_from is not None:
        table.add_row("went on after step", f"{report.resumed_from:,}")
    table.add_row("adapter", str(report.adapter_dir))
    if report.best_dir is not None and report.best is not None:
        table.add_row(f"best, of step {report.best.step}", str(report.best_dir))
    table.add_row("metrics", str(report.metrics_path))
    if report.plot_path is not None:
        table.add_row("loss plot", str(report.plot_path))
    Console(soft_wrap=True).print(table)


def _ending(report: Any, goes_on: bool) -> str:
    if report.interrupted:
        return " (interrupted; the same command goes on)" if goes_on else " (interrupted)"
    return " (stopped early)" if report.stopped_early else ""


def register(app: typer.Typer) -> None:
    """Add `nybble finetune`."""
    app.command("finetune")(command)
