"""TrainConfig: every choice of a training run, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _help(text: str) -> dict[str, str]:
    """A field carries its own help text, which the command line shows."""
    return {"help": text}


_CHOICES = {
    "dtype": ("bf16", "fp32"),
    "packing": ("stream", "documents", "none"),
    "optimizer": ("adamw", "adamw8bit", "lion", "sgd"),
    "schedule": ("cosine", "linear", "constant"),
    "parallel": ("auto", "none", "ddp", "fsdp"),
}

# What may differ between a run and its continuation: none of it changes a bit of the result, but how many processes
# there are, which changes the order of sums and is told; and fp32_weights, since the dtypes of what is trained are
# compared themselves.
_FREE = (
    "fp32_weights",
    "out_dir",
    "plot",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "tensorboard",
    "parallel",
    "low_memory",
)


def _either(allowed: tuple[str, ...]) -> str:
    *first, last = map(repr, allowed)
    return f"{', '.join(first)} or {last}"


@dataclass(frozen=True)
class TrainConfig:
    """What `finetune` does. One optimizer step sees batch_size * grad_accum sequences of seq_len predicted tokens.

    Raises ValueError, naming the field, what came and what is allowed.
    """

    steps: int | None = field(default=None, metadata=_help("optimizer steps; leave out to use epochs"))
    epochs: float | None = field(
        default=None, metadata=_help("passes over the training text; 1 when steps is not given either")
    )
    batch_size: int = field(
        default=4, metadata=_help("sequences in one forward pass, of all processes together (a multiple of them)")
    )
    grad_accum: int = field(default=1, metadata=_help("forward passes whose gradients are summed into one step"))
    seq_len: int = field(default=512, metadata=_help("predicted tokens in a sequence"))
    packing: str = field(
        default="stream",
        metadata=_help(
            "stream: documents joined and cut into rows; documents: whole ones in a row that do not see each other; "
            "none: one a row, padded"
        ),
    )
    optimizer: str = field(
        default="adamw", metadata=_help("adamw; adamw8bit: its moments block-wise in 8 bits; lion (lion-pytorch); sgd")
    )
    lr: float = field(default=2e-4, metadata=_help("peak learning rate"))
    lora_plus_ratio: float = field(
        default=1.0, metadata=_help("LoRA+: learning rate of the B matrices as a multiple of lr (16 in the paper)")
    )
    head_lr_ratio: float = field(
        default=1.0, metadata=_help("learning rate of a classifier's new head as a multiple of lr")
    )
    schedule: str = field(
        default="cosine",
        metadata=_help("learning rate after warm-up: cosine, linear (both to min_lr_ratio) or constant"),
    )
    warmup_steps: int = field(default=10, metadata=_help("steps in which the learning rate rises linearly to its peak"))
    min_lr_ratio: float = field(
        default=0.1, metadata=_help("learning rate at the end of the schedule, as a share of the peak")
    )
    weight_decay: float = field(
        default=0.0, metadata=_help("decoupled weight decay on parameters of two or more dimensions")
    )
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=_help("decay of the first and second moments"))
    eps: float = field(default=1e-8, metadata=_help("AdamW's denominator offset"))
    max_grad_norm: float = field(
        default=1.0, metadata=_help("clip the gradient's global norm to this; 0 turns clipping off")
    )
    ema_decay: float = field(
        default=0.0,
        metadata=_help("keep a running mean of the weights with this decay, evaluate and save it; 0: none"),
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=_help("keep only layer inputs and recompute the rest in the backward pass")
    )
    low_memory: bool = field(
        default=False,
        metadata=_help(
            "on the CPU under Linux, give memory back as soon as it is freed: no more is held than tensors take, and "
            "steps take longer"
        ),
    )
    dtype: str = field(
        default="bf16", metadata=_help("bf16: autocast to bfloat16; fp32: no autocast, the model's own dtypes")
    )
    fp32_weights: bool = field(
        default=False,
        metadata=_help(
            "trained weights become fp32 when the run begins, whatever they were loaded in; with fsdp a layer at a time"
        ),
    )
    loss_chunk: int = field(default=256, metadata=_help("tokens whose logits exist at once in the loss"))
    val_fraction: float = field(
        default=0.0, metadata=_help("share of the sequences, from the end, held out for evaluation")
    )
    eval_every: int = field(
        default=0, metadata=_help("steps between evaluations; 0 evaluates only before and after training")
    )
    eval_windows: int | None = field(default=None, metadata=_help("evaluate on at most this many held-out sequences"))
    early_stopping: int = field(
        default=0, metadata=_help("stop after this many evaluations in a row without a better loss; 0: never")
    )
    keep_best: bool = field(
        default=False, metadata=_help("keep what gave the best held-out loss in best/, beside the last in adapter/")
    )
    save_every: int = field(
        default=100, metadata=_help("steps between checkpoints from which an interrupted run goes on; 0: none")
    )
    keep_checkpoints: int = field(default=2, metadata=_help("checkpoints kept, so that a damaged one has another"))
    log_every: int = field(default=1, metadata=_help("steps between lines in metrics.jsonl and in plain output"))
    seed: int = field(default=0, metadata=_help("order of the sequences and dropout"))
    out_dir: str | Path | None = field(
        default=None, metadata=_help("where adapter/, metrics.jsonl and loss.png are written; None: nowhere")
    )
    tensorboard: bool = field(default=False, metadata=_help("write TensorBoard's files too (needs tensorboard)"))
    fused: bool = field(
        default=True,
        metadata=_help("on the CPU, norms, gated MLPs, rotary embeddings and attention's gradient by nybble's kernels"),
    )
    plot: bool = field(default=True, metadata=_help("draw loss.png (needs matplotlib)"))
    parallel: str = field(
        default="auto",
        metadata=_help(
            "with several processes (torchrun): ddp, the model in each; fsdp, a part of it in each; auto: ddp where "
            "there are several; none: each trains alone"
        ),
    )

    def __post_init__(self) -> None:
        self._check_length()
        for name in ("batch_size", "grad_accum", "seq_len", "loss_chunk", "log_every", "keep_checkpoints"):
            self._integer(name, 1)
        for name in ("warmup_steps", "eval_every", "early_stopping", "save_every", "seed"):
            self._integer(name, 0)
        if self.eval_windows is not None:
            self._integer("eval_windows", 1)
        for name in ("lr", "eps", "lora_plus_ratio", "head_lr_ratio"):
            self._number(name, "above 0", lambda v: v > 0)
        for name in ("weight_decay", "max_grad_norm"):
            self._number(name, "at least 0", lambda v: v >= 0)
        self._number("min_lr_ratio", "from 0 to 1", lambda v: 0 <= v <= 1)
        for name in ("val_fraction", "ema_decay"):
            self._number(name, "at least 0 and below 1", lambda v: 0 <= v < 1)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers at least 0 and below 1, got {self.betas!r}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {_either(allowed)}, got {getattr(self, name)!r}")
        if self.early_stopping and not self.eval_every:
            raise ValueError(f"early_stopping={self.early_stopping} counts evaluations: give eval_every too, got 0")
        if self.keep_best and self.out_dir is None:
            raise ValueError("keep_best needs out_dir: best/ is written there")

    def _check_length(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps or epochs, not both: got steps={self.steps!r} and epochs={self.epochs!r}")
        if self.steps is not None:
            self._integer("steps", 1)
        if self.epochs is not None:
            self._number("epochs", "above 0", lambda v: v > 0)

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    def _number(self, name: str, allowed: str, holds: Any) -> None:
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or not holds(value)
        ):
            raise ValueError(f"{name} must be a number {allowed}, got {value!r}")

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.grad_accum

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens in one optimizer step."""
        return self.sequences_per_step * self.seq_len

    def total_steps(self, sequences: int) -> int:
        """Optimizer steps of this run over a training set of `sequences` packed sequences; at least 1."""
        if self.steps is not None:
            return self.steps
        epochs = 1.0 if self.epochs is None else self.epochs
        return max(1, math.ceil(epochs * sequences / self.sequences_per_step))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        content = dataclasses.asdict(self)
        content["betas"] = list(self.betas)
        content["out_dir"] = None if self.out_dir is None else str(self.out_dir)
        return content

    def identity(self) -> dict[str, Any]:
        """JSON-able: what decides the result's bits."""
        return {name: value for name, value in self.to_dict().items() if name not in _FREE}


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step`, 0 the first: linear warm-up, then config.schedule to min_lr_ratio * lr.

    The last warm-up step has the full rate, the last step of the run has the least one. A warm-up longer than the run
    is cut to the run.
    """
    warmup = min(config.warmup_steps, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, total_steps - warmup)
    progress = min(1.0, progress)
    if config.schedule == "constant":
        return config.lr
    share = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)
