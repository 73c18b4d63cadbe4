"""The main job, end to end: bf16 checkpoint, NF4, perplexity, LoRA over the 4-bit base, perplexity again, one table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..checkpoint import CheckpointReport, load, quantize
from ..checkpoint.files import check_destination
from ..formats import QuantConfig
from ..generation import generate_text
from ..nn import LoRAConfig, add_lora
from ..training.config import TrainConfig
from ..training.evaluate import perplexity
from ..training.loop import TrainReport, finetune
from ..training.metrics import format_memory, peak_memory_bytes
from . import bible, smollm2

PROMPT = "And it came to pass in those days, that"
EVAL_TOKENS = 4096
WINDOW = 512


@dataclass
class DemoReport:
    """What the demo measured. Perplexities are on the held-out book; bits per weight over the quantized linears."""

    checkpoint: CheckpointReport
    perplexity_bf16: float
    perplexity_nf4: float
    perplexity_tuned: float
    training: TrainReport
    verse_before: str
    verse_after: str
    eval_windows: int
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


def run(out: str | Path = "demo-out", *, steps: int = 60, console: Console | None = None) -> DemoReport:
    """Run the demo in directory `out` (new or empty) and print its table.

    Leaves out/smollm2-bf16, out/smollm2-nf4 and out/lora (adapter/, metrics.jsonl, loss.png).
    Raises DestinationExistsError when `out` is not empty, FileNotFoundError naming the package to install when the
    model or the text is missing.
    """
    console = console or Console()
    out = Path(out)
    check_destination(smollm2.find_gguf(), out)
    started = time.perf_counter()
    stages: dict[str, float] = {}

    with _stage(console, stages, "SmolLM2-135M from Q4_1 to a bf16 checkpoint"):
        bf16_dir = smollm2.write_checkpoint(out / "smollm2-bf16")
    with _stage(console, stages, "quantize to NF4, double-quantized"):
        checkpoint = quantize(bf16_dir, out / "smollm2-nf4", QuantConfig("nf4", block_size=64, double_quant=True))
    tokenizer = _tokenizer(bf16_dir)
    tokens = torch.tensor(tokenizer.encode(bible.held_out_text()))[:EVAL_TOKENS]
    with _stage(console, stages, "perplexity of the bf16 model"):
        perplexity_bf16 = perplexity(load(bf16_dir), tokens, WINDOW)
    model = load(out / "smollm2-nf4")
    with _stage(console, stages, "perplexity of the NF4 model"):
        perplexity_nf4 = perplexity(model, tokens, WINDOW)
    with _stage(console, stages, "a verse before"):
        before = generate_text(model, tokenizer, PROMPT, 40)

    torch.manual_seed(0)  # the adapter's first values
    add_lora(model, LoRAConfig(r=16, alpha=32, target="all-linear"))
    with _stage(console, stages, "fine-tune"):
        training = finetune(
            model, bible.training_documents(), train_config(out / "lora", steps), tokenizer=tokenizer, console=console
        )
    with _stage(console, stages, "perplexity after tuning"):
        perplexity_tuned = perplexity(model, tokens, WINDOW)
    with _stage(console, stages, "a verse after"):
        after = generate_text(model, tokenizer, PROMPT, 40)

    report = DemoReport(
        checkpoint,
        perplexity_bf16,
        perplexity_nf4,
        perplexity_tuned,
        training,
        before,
        after,
        tokens.numel() // WINDOW,
        time.perf_counter() - started,
        stages,
    )
    _print(console, report)
    return report


def train_config(out_dir: Path, steps: int = 60) -> TrainConfig:
    """The demo's training run: 1,024 tokens a step, so that 2 cores with bf16 arithmetic need 2 to 3 minutes."""
    return TrainConfig(
        steps=steps, batch_size=4, seq_len=256, lr=1e-3, warmup_steps=min(5, steps), log_every=5, out_dir=out_dir
    )


@contextmanager
def _stage(console: Console, stages: dict[str, float], name: str) -> Iterator[None]:
    console.print(f"[bold]{name}[/bold] ...")
    started = time.perf_counter()
    yield
    stages[name] = time.perf_counter() - started
    console.print(f"  {stages[name]:.1f} s", highlight=False)


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _print(console: Console, report: DemoReport) -> None:
    checkpoint, training = report.checkpoint, report.training
    table = Table(title="SmolLM2-135M, all linear layers but the head", title_justify="left")
    for name in ("", "bf16", "NF4", "NF4 + LoRA r=16"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("size", format_memory(checkpoint.bytes_before), format_memory(checkpoint.bytes_after), "")
    table.add_row("bits per weight, quantized layers", "16", f"{checkpoint.bits_per_weight:.3f}", "")
    table.add_row("bits per weight, whole model", "16", f"{checkpoint.bits_per_weight_total:.3f}", "")
    values = (report.perplexity_bf16, report.perplexity_nf4, report.perplexity_tuned)
    table.add_row("perplexity on 1 John", *(f"{value:.2f}" for value in values))
    table.add_row("trained parameters", "", "", f"{training.trainable_parameters:,}")
    table.add_row("training tokens/s", "", "", f"{training.tokens_per_second:,.0f}")
    table.add_row("peak memory of the whole run", "", "", format_memory(peak_memory_bytes()))
    table.add_row("total time", "", "", f"{report.seconds:.0f} s")
    for text in (
        f"Perplexities are {smollm2.NOTE}: the source file was 4-bit once already. They are over {report.eval_windows} "
        f"windows of {WINDOW} tokens of 1 John (King James), which no training text contains.",
        f"Prompt: {PROMPT}",
        f"before:{_one_line(report.verse_before)}",
        f"after: {_one_line(report.verse_after)}",
    ):
        console.print(text, markup=False, highlight=False)
    console.print(table)
    for what, path in (("loss plot", training.plot_path), ("adapter", training.adapter_dir)):
        console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)


def _one_line(text: str) -> str:
    return " " + " ".join(text.split())
