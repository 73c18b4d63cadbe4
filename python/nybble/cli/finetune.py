"""`nybble finetune`: train an adapter over a model, quantized or not."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.config import TrainConfig

_HELP = {field.name: field.metadata["help"] for field in fields(TrainConfig)}


def _option(field: str, *names: str) -> Any:
    return typer.Option(*names, help=_HELP[field])


def command(
    model_dir: Annotated[Path, typer.Argument(help="Directory of the model: quantized by nybble, or a plain one.")],
    data: Annotated[Path, typer.Argument(help='A text file, a .jsonl file of {"text": ...}, or a directory of them.')],
    out: Annotated[Path, typer.Argument(help="Where adapter/, metrics.jsonl and loss.png go; new or empty.")],
    method: Annotated[str, typer.Option(help="What is trained: lora.")] = "lora",
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of the LoRA matrices.")] = 16,
    alpha: Annotated[float, typer.Option(help="LoRA's scale is alpha / rank.")] = 32,
    dropout: Annotated[float, typer.Option(help="Dropout on the LoRA path's input.")] = 0.0,
    rslora: Annotated[bool, typer.Option(help="Scale by alpha / sqrt(rank).")] = False,
    target: Annotated[
        list[str] | None, typer.Option(help="Name pattern of layers to adapt; repeatable.  [default: all-linear]")
    ] = None,
    steps: Annotated[int | None, _option("steps")] = TrainConfig.steps,
    epochs: Annotated[float | None, _option("epochs")] = TrainConfig.epochs,
    batch_size: Annotated[int, _option("batch_size", "--batch-size", "-b")] = TrainConfig.batch_size,
    grad_accum: Annotated[int, _option("grad_accum")] = TrainConfig.grad_accum,
    seq_len: Annotated[int, _option("seq_len")] = TrainConfig.seq_len,
    lr: Annotated[float, _option("lr")] = TrainConfig.lr,
    warmup_steps: Annotated[int, _option("warmup_steps")] = TrainConfig.warmup_steps,
    min_lr_ratio: Annotated[float, _option("min_lr_ratio")] = TrainConfig.min_lr_ratio,
    weight_decay: Annotated[float, _option("weight_decay")] = TrainConfig.weight_decay,
    max_grad_norm: Annotated[float, _option("max_grad_norm")] = TrainConfig.max_grad_norm,
    gradient_checkpointing: Annotated[bool, _option("gradient_checkpointing")] = TrainConfig.gradient_checkpointing,
    dtype: Annotated[str, _option("dtype")] = TrainConfig.dtype,
    eval_data: Annotated[Path | None, typer.Option(help="Held-out text, in the same forms as DATA.")] = None,
    val_fraction: Annotated[float, _option("val_fraction")] = TrainConfig.val_fraction,
    eval_every: Annotated[int, _option("eval_every")] = TrainConfig.eval_every,
    eval_windows: Annotated[int | None, _option("eval_windows")] = TrainConfig.eval_windows,
    log_every: Annotated[int, _option("log_every")] = TrainConfig.log_every,
    seed: Annotated[int, _option("seed")] = TrainConfig.seed,
    plot: Annotated[bool, _option("plot")] = TrainConfig.plot,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Fine-tune a model on text and save the adapter in PEFT's layout."""
    if method != "lora":
        raise ValueError(f"method must be 'lora', got {method!r}")
    config = TrainConfig(
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        grad_accum=grad_accum,
        seq_len=seq_len,
        lr=lr,
        warmup_steps=warmup_steps,
        min_lr_ratio=min_lr_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        gradient_checkpointing=gradient_checkpointing,
        dtype=dtype,
        val_fraction=val_fraction,
        eval_every=eval_every,
        eval_windows=eval_windows,
        log_every=log_every,
        seed=seed,
        out_dir=out,
        plot=plot,
    )
    for path in (data, eval_data):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path}: no such file or directory")
    import torch

    from ..nn import LoRAConfig, add_lora
    from ..training.loop import finetune
    from .shared import load_model

    layers = "all-linear" if target is None else tuple(target)
    lora = LoRAConfig(r=rank, alpha=alpha, dropout=dropout, target=layers, rslora=rslora)
    model, tokenizer = load_model(model_dir, device=device)
    torch.manual_seed(seed)  # the adapter's first values
    add_lora(model, lora)
    report = finetune(model, data, config, tokenizer=tokenizer, eval_data=eval_data)
    _print_summary(report)
    if report.interrupted:
        raise typer.Exit(130)


def _print_summary(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..training.metrics import format_memory

    table = Table(show_header=False)
    table.add_row("steps", f"{len(report.losses):,}" + (" (interrupted)" if report.interrupted else ""))
    table.add_row("loss, first and last step", f"{report.losses[0]:.4f}  {report.losses[-1]:.4f}")
    for evaluation in report.evaluations:
        table.add_row(f"held-out perplexity, step {evaluation.step}", f"{evaluation.perplexity:.3f}")
    table.add_row("tokens/s", f"{report.tokens_per_second:,.0f}")
    table.add_row("peak memory", format_memory(report.peak_memory_bytes))
    table.add_row("adapter", str(report.adapter_dir))
    table.add_row("metrics", str(report.metrics_path))
    if report.plot_path is not None:
        table.add_row("loss plot", str(report.plot_path))
    Console(soft_wrap=True).print(table)


def register(app: typer.Typer) -> None:
    """Add `nybble finetune`."""
    app.command("finetune")(command)
