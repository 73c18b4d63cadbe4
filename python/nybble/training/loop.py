"""The training loop: packed text in, a trained adapter out. Reads top to bottom."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..errors import DestinationExistsError
from .config import TrainConfig, learning_rate
from .data import Batches, Data, pack, split, to_tokens
from .evaluate import check_length, check_vocabulary, mean_loss, perplexity_of
from .loss import CausalLoss
from .metrics import Display, MetricsFile, memory_bytes, peak_memory_bytes
from .plot import plot_loss


class NonFiniteLossError(ValueError):
    """The loss or the gradient became NaN or infinite; `step` (1 is the first) is where."""

    def __init__(self, step: int, what: str, value: float, lr: float) -> None:
        super().__init__(
            f"step {step}: the {what} is {value}, training stopped (learning rate {lr:.3g}); no adapter was saved. "
            "A lower lr, a longer warm-up or dtype='fp32' may help"
        )
        self.step = step


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per predicted token on the held-out sequences after `step` optimizer steps."""

    step: int
    loss: float

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)


@dataclass
class TrainReport:
    """What a run did. `losses[i]` is the mean loss of step i + 1 in nats per token; paths are None without out_dir."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    tokens: int = 0
    """Predicted tokens trained on."""
    seconds: float = 0.0
    """Wall time of the training steps alone, without evaluations."""
    peak_memory_bytes: int | None = None
    trainable_parameters: int = 0
    interrupted: bool = False
    """Stopped by Ctrl-C; what was trained until then is saved."""
    adapter_dir: Path | None = None
    metrics_path: Path | None = None
    plot_path: Path | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def finetune(
    model: nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    tokenizer: Any = None,
    eval_data: Data | None = None,
    save: Callable[[nn.Module, Path], None] | None = None,
    show: bool = True,
    console: Console | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainReport:
    """Train the model's trainable parameters on next-token prediction and return a report.

    model: a causal language model, transformers' or any nn.Module from ids [B, T] to logits [B, T, vocabulary]; for an
        adapter, after `nybble.add_lora`. It is trained in place and left in the mode it was in.
    data: a text file, a JSONL file of {"text": ...}, a directory of them, a list of documents, or token ids [n].
    tokenizer: turns text into ids; not needed for token ids.
    eval_data: held-out text in the same forms, instead of config.val_fraction.
    save: writes what was trained into a directory; by default `nybble.save_adapter` (PEFT's layout).
    on_step: called with (step, loss) after each optimizer step.

    With config.out_dir, writes adapter/, metrics.jsonl and loss.png there. Ctrl-C ends the run after the step in
    progress and saves; a second one ends it at once.

    Raises ValueError for data, config or a model that do not fit together, DestinationExistsError when out_dir is not
    empty, NonFiniteLossError when the loss or the gradient is NaN or infinite.
    """
    config = config or TrainConfig()
    rows, eval_rows = prepare_data(model, data, config, tokenizer, eval_data)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        raise ValueError("model has no trainable parameter; call nybble.add_lora(model, ...) first")
    checkpointing = _checkpointing(model, config)
    out = _prepare_out_dir(model, config, save)

    total_steps = config.total_steps(rows.shape[0])
    report = TrainReport(trainable_parameters=trainable, metrics_path=None if out is None else out / "metrics.jsonl")
    metrics = MetricsFile(report.metrics_path)
    display = Display(total_steps, config.log_every, enabled=show, console=console)
    metrics.write("config", **config.to_dict(), total_steps=total_steps, sequences=rows.shape[0])
    display.say(
        f"{trainable:,} trainable parameters; {rows.shape[0]:,} sequences of {config.seq_len}; "
        f"{total_steps:,} steps of {config.tokens_per_step:,} tokens"
    )
    torch.manual_seed(config.seed)  # dropout
    with contextlib.closing(metrics), _training_mode(model, checkpointing), display:
        train(model, rows, eval_rows, config, Recorder(report, metrics, display, config), on_step)
    report.peak_memory_bytes = peak_memory_bytes(next(model.parameters()).device)
    if out is not None:
        _write_results(model, report, config, out, save, display)
    return report


def train(
    model: nn.Module,
    rows: Tensor,
    eval_rows: Tensor | None,
    config: TrainConfig,
    recorder: Recorder,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """The loop itself: rows and eval_rows are packed sequences [n, seq_len + 1]; results go to `recorder`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = make_optimizer(model, config)
    loss_function = CausalLoss(model, config.loss_chunk)
    batches = Batches(rows, config.seed)
    total_steps = config.total_steps(rows.shape[0])

    def evaluate(step: int) -> None:
        if eval_rows is not None:
            with _autocast(device, config):
                loss = mean_loss(model, eval_rows, batch_size=config.batch_size, chunk=config.loss_chunk)
            recorder.evaluation(step, loss)

    with _Interrupt() as interrupt:
        evaluate(0)
        for step in range(1, total_steps + 1):
            started = time.perf_counter()
            lr = learning_rate(step - 1, total_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # The sum over all micro-batches of losses divided by the step's tokens: the mean of the one big batch.
            loss = torch.zeros((), device=device)
            for micro in range(config.grad_accum):
                position = (step - 1) * config.sequences_per_step + micro * config.batch_size
                batch = batches.at(position, config.batch_size).to(device)
                with _autocast(device, config):
                    part = loss_function(batch[:, :-1], batch[:, 1:]) / config.tokens_per_step
                part.backward()
                loss += part.detach()

            _check_finite(step, "loss", loss, lr)
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            _check_finite(step, "gradient's norm", norm, lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            recorder.step(step, total_steps, float(loss), lr, float(norm), time.perf_counter() - started, device)
            if on_step is not None:
                on_step(step, float(loss))
            if interrupt.requested and step < total_steps:
                recorder.report.interrupted = True
                return
            if step == total_steps or (config.eval_every and step % config.eval_every == 0):
                evaluate(step)


@dataclass
class Recorder:
    """Puts each figure where it belongs: the report, metrics.jsonl and the display."""

    report: TrainReport
    metrics: MetricsFile
    display: Display
    config: TrainConfig

    def step(
        self, step: int, total_steps: int, loss: float, lr: float, norm: float, seconds: float, device: torch.device
    ) -> None:
        report, tokens = self.report, self.config.tokens_per_step
        report.losses.append(loss)
        report.tokens += tokens
        report.seconds += seconds
        memory = memory_bytes(device)
        self.display.step(step, loss, report.tokens_per_second, memory)
        if step == 1 or step % self.config.log_every == 0 or step == total_steps:
            self.metrics.write(
                "step",
                step=step,
                loss=loss,
                lr=lr,
                grad_norm=norm,
                tokens=report.tokens,
                tokens_per_second=tokens / seconds,
                memory_bytes=memory,
                seconds=report.seconds,
            )

    def evaluation(self, step: int, loss: float) -> None:
        evaluation = Evaluation(step, loss)
        self.report.evaluations.append(evaluation)
        self.metrics.write("eval", step=step, loss=loss, perplexity=evaluation.perplexity)
        self.display.say(f"step {step}: held-out loss {loss:.4f}, perplexity {evaluation.perplexity:.3f}")


def _check_finite(step: int, what: str, value: Tensor, lr: float) -> None:
    if not math.isfinite(value):
        raise NonFiniteLossError(step, what, float(value), lr)


def prepare_data(
    model: nn.Module, data: Data, config: TrainConfig, tokenizer: Any = None, eval_data: Data | None = None
) -> tuple[Tensor, Tensor | None]:
    """(training rows, held-out rows or None), each int64 [n, seq_len + 1], checked against the model."""
    check_length(model, config.seq_len, "seq_len")
    if eval_data is not None and config.val_fraction:
        raise ValueError(f"give eval_data or val_fraction, not both: got eval_data and {config.val_fraction}")
    tokens = to_tokens(data, tokenizer)
    check_vocabulary(model, tokens, "data")
    rows, eval_rows = split(pack(tokens, config.seq_len), config.val_fraction)
    if eval_data is not None:
        eval_rows = pack(to_tokens(eval_data, tokenizer, "eval_data"), config.seq_len, "eval_data")
    if eval_rows is not None and config.eval_windows is not None:
        eval_rows = eval_rows[: config.eval_windows]
    return rows, eval_rows


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on those of two or more dimensions only."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def _prepare_out_dir(model: nn.Module, config: TrainConfig, save: Any) -> Path | None:
    """Check before the work what would fail after it: the directory, something to save, matplotlib."""
    if config.out_dir is None:
        return None
    out = Path(config.out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DestinationExistsError(f"out_dir {out} exists and is not empty; a new or empty directory is needed")
    if save is None:
        from ..checkpoint.peft import lora_layers

        if not lora_layers(model):
            raise ValueError(
                "model has no LoRA layer, so there is no adapter to save: call nybble.add_lora first, "
                "or give save=..., or out_dir=None"
            )
    if config.plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the loss plot needs matplotlib: pip install 'nybble[plot]', or plot=False")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _write_results(
    model: nn.Module, report: TrainReport, config: TrainConfig, out: Path, save: Any, display: Display
) -> None:
    if save is None:
        from ..checkpoint.peft import save_adapter as save
    report.adapter_dir = out / "adapter"
    save(model, report.adapter_dir)
    if config.plot:
        evaluations = [(e.step, e.loss) for e in report.evaluations]
        report.plot_path = plot_loss(report.losses, evaluations, out / "loss.png")
    stopped = f"stopped after step {len(report.losses)} of {display.total_steps}; " if report.interrupted else ""
    display.say(f"{stopped}saved in {report.adapter_dir}")


def _autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bf16")


@contextlib.contextmanager
def _training_mode(model: nn.Module, checkpointing: str | None) -> Iterator[None]:
    """Training mode, and with `checkpointing` recomputation in the backward pass, for the time of the run."""
    was_training = model.training
    already_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    switch = None if already_on else checkpointing
    if switch is not None:
        getattr(model, f"{switch}_enable")(**{f"{switch}_kwargs": {"use_reentrant": False}})
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        if switch is not None:
            getattr(model, f"{switch}_disable")()
        for parameter in model.parameters():
            parameter.grad = None


def _checkpointing(model: nn.Module, config: TrainConfig) -> str | None:
    """What the model calls it, if config wants it: transformers renamed its methods in 5.23 (the old name warns)."""
    if not config.gradient_checkpointing:
        return None
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(model, f"{name}_enable"):
            return name
    raise ValueError(f"gradient_checkpointing: {type(model).__name__} has no gradient_checkpointing_enable()")


class _Interrupt:
    """Turns the first Ctrl-C into a flag, so that a step is never cut in half; the second one interrupts at once.

    Signals reach only the main thread; elsewhere the flag simply stays down.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous if self._previous is not None else signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
