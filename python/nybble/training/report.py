"""What a run did, and the one place that each figure goes through: the report, metrics.jsonl and the display."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .config import TrainConfig
from .evaluate import perplexity_of
from .metrics import Display, MetricsFile, memory_bytes


@dataclass(frozen=True)
class Evaluation:
    """Mean loss on the held-out data after `step` optimizer steps, in nats per predicted token (per label).

    `accuracy` is the share of right labels, of classification alone.
    """

    step: int
    loss: float
    accuracy: float | None = None

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)


@dataclass
class TrainReport:
    """What a run did. `losses[i]` is the mean loss of step i + 1 in nats per token; paths are None without out_dir."""

    losses: list[float] = field(default_factory=list)
    adapter_losses: dict[str, list[float]] = field(default_factory=dict)
    """Of each adapter, when several are trained at once; `losses` is their mean then."""
    evaluations: list[Evaluation] = field(default_factory=list)
    tokens: int = 0
    """Predicted tokens trained on."""
    seconds: float = 0.0
    """Wall time of the training steps alone, without evaluations and checkpoints."""
    peak_memory_bytes: int | None = None
    trainable_parameters: int = 0
    interrupted: bool = False
    """Stopped by Ctrl-C; what was trained until then is saved, and the same call goes on (with config.save_every)."""
    stopped_early: bool = False
    """The held-out loss did not get better any more (config.early_stopping)."""
    resumed_from: int | None = None
    """The step after which an interrupted run was taken up again."""
    best: Evaluation | None = None
    adapter_dir: Path | None = None
    best_dir: Path | None = None
    metrics_path: Path | None = None
    plot_path: Path | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def best_of(evaluations: list[Evaluation]) -> Evaluation | None:
    """The first of those with the lowest loss; NaN is worse than any."""
    return min(evaluations, key=lambda e: math.inf if math.isnan(e.loss) else e.loss, default=None)


@dataclass
class Recorder:
    """Puts each figure where it belongs: the report, metrics.jsonl and TensorBoard, the display."""

    report: TrainReport
    metrics: MetricsFile
    display: Display
    config: TrainConfig

    def step(
        self,
        step: int,
        total_steps: int,
        losses: dict[str | None, float],
        tokens: int,
        lr: float,
        norm: float,
        seconds: float,
        device: torch.device,
    ) -> float:
        """losses: mean loss by adapter, or under None of the one that is trained. Returns their mean."""
        report = self.report
        loss = sum(losses.values()) / len(losses)
        report.losses.append(loss)
        named = {name: value for name, value in losses.items() if name is not None}
        for name, value in named.items():
            report.adapter_losses.setdefault(name, []).append(value)
        report.tokens += tokens
        report.seconds += seconds
        memory = memory_bytes(device)
        self.display.step(step, loss, report.tokens_per_second, memory)
        if step == 1 or step % self.config.log_every == 0 or step == total_steps:
            self.metrics.write(
                "step",
                step=step,
                loss=loss,
                **({"losses": named} if named else {}),
                lr=lr,
                grad_norm=norm,
                tokens=report.tokens,
                tokens_per_second=tokens / seconds,
                memory_bytes=memory,
                seconds=report.seconds,
            )
        return loss

    def evaluation(self, evaluation: Evaluation) -> bool:
        """Whether it is the best so far."""
        report = self.report
        report.evaluations.append(evaluation)
        shown = f"perplexity {evaluation.perplexity:.3f}"
        values = {"loss": evaluation.loss, "perplexity": evaluation.perplexity}
        if evaluation.accuracy is not None:
            shown = f"accuracy {evaluation.accuracy:.4f}"
            values = {"loss": evaluation.loss, "accuracy": evaluation.accuracy}
        self.metrics.write("eval", step=evaluation.step, **values)
        self.display.say(f"step {evaluation.step}: held-out loss {evaluation.loss:.4f}, {shown}")
        report.best = best_of(report.evaluations)
        return report.best is evaluation

    @property
    def stale(self) -> int:
        """Evaluations since the best one."""
        report = self.report
        return 0 if report.best is None else sum(e.step > report.best.step for e in report.evaluations)
