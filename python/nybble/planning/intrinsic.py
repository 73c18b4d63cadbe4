"""The intrinsic dimension of a task: in how many random directions must a model move to learn it?

Li et al. (arXiv 1804.08838) train theta = theta_0 + P z with z of d numbers and P random, and call the least d that
reaches 90% of what full training reaches d90; Aghajanyan et al. (arXiv 2012.13255) measure it for fine-tuning. That it
is small is what LoRA rests on.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.writer import Staging
from ..errors import CheckpointError, DestinationExistsError
from ..nn.full import train_all, train_only
from ..nn.subspace import Subspace, add_subspace
from ..training.classifier import ClassificationLoss, TextClassifier, accuracy
from ..training.config import TrainConfig
from ..training.data import Labelled
from ..training.loop import finetune
from ..training.run_directory import fingerprint

if TYPE_CHECKING:
    from rich.table import Table

JSON_NAME = "intrinsic.json"
DIMS = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
SHARE = 0.9
FULL, PROBE = "full", "probe"


@dataclass(frozen=True)
class IntrinsicConfig:
    """How every run of the sweep trains; all see the same texts in the same order.

    Attributes:
        epochs, batch_size, seed: as in `TrainConfig`; the schedule is cosine after a warm-up of 6% of the steps. dtype:
            "fp32" (movements in a subspace are smaller than what bf16 can add to a weight) or "bf16".
        step: of a run in a subspace: see `subspace_lr`. The default is for a model of 23 M (MiniLM: after 20 steps at
            d = 3,000 the loss was 2.90 with 16, 3.69 with 4).
        lr: of full fine-tuning. head_lr: of the new head, there and in the probe, and beside a subspace if head is
            "trained".
        head: "subspace": the head moves in the subspace with the rest, and d is all that is trained. "trained": it is
            trained in full beside it, and d is what the encoder has.
        structure: SAID, a scale for each block (`add_subspace`).
    """

    epochs: float = 3.0
    batch_size: int = 32
    seed: int = 0
    dtype: str = "fp32"
    step: float = 16.0
    lr: float = 1e-4
    head_lr: float = 1e-2
    head: str = "subspace"
    structure: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field."""
        if self.head not in ("subspace", "trained"):
            raise ValueError(f"head must be 'subspace' or 'trained', got {self.head!r}")
        for name in ("step", "head_lr"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        self.training(self.lr, 1, 1)

    def subspace_lr(self, dims: int, size: int) -> float:
        """The learning rate of z: step / sqrt(d), so that a step of Adam, which moves every number by about the rate,
        moves the model as far for every d; but no more than lr * size / d, which for d = size is that of full
        fine-tuning. Measured on MiniLM: 16 / sqrt(d) learns at d = 10,000, and at 100,000, where it is twice the
        second bound, comes to no more than the most frequent class."""
        return min(self.step / math.sqrt(dims), self.lr * size / dims)

    def training(self, lr: float, texts: int, longest: int, head_lr: float | None = None) -> TrainConfig:
        """Of a run with this learning rate on so many texts, the longest of so many tokens."""
        config = TrainConfig(
            epochs=self.epochs, batch_size=self.batch_size, seq_len=longest, seed=self.seed, dtype=self.dtype, lr=lr,
            head_lr_ratio=1.0 if head_lr is None else head_lr / lr,
        )  # fmt: skip
        steps = config.total_steps(texts)
        return TrainConfig(**{**asdict(config), "warmup_steps": max(1, round(0.06 * steps))})


@dataclass(frozen=True)
class Run:
    """One run: `dims` 0 for the probe, None for full fine-tuning; accuracy and loss are on the held-out texts."""

    name: str
    dims: int | None
    trained: int
    lr: float
    accuracy: float
    loss: float
    train_loss: float
    seconds: float


@dataclass(frozen=True)
class Reading:
    """One way to say what 90% is.

    Attributes:
        threshold: the accuracy to reach. d90: the least d of the sweep that does; None if none does. below: the
            largest d of the sweep under d90, None if d90 is the smallest. crossing: where the line between these two,
            over log d, meets the threshold.
    """

    what: str
    threshold: float
    d90: int | None
    below: int | None
    crossing: float | None


@dataclass
class IntrinsicReport:
    """Returned by `intrinsic`.

    Attributes:
        size: numbers of the model that move with z. majority: accuracy of the training texts' most frequent class.
        settings: what all runs have in common. unused: parameters that the model's output does not depend on.
        complete: whether every run of the sweep is there.
    """

    size: int
    classes: int
    texts: int
    held_out: int
    majority: float
    settings: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    complete: bool = False

    def run(self, name: str) -> Run | None:
        """The run of this name: "full", "probe", or the number of dimensions."""
        return next((run for run in self.runs if run.name == name), None)

    def curve(self) -> list[Run]:
        """The runs in subspaces, by their dimensions."""
        return sorted((run for run in self.runs if run.dims), key=lambda run: run.dims or 0)

    def readings(self) -> list[Reading]:
        """d90 by each of the thresholds; empty before full fine-tuning has run."""
        full, probe = self.run(FULL), self.run(PROBE)
        if full is None:
            return []
        found = [self._reading("90% of full fine-tuning's accuracy", 0.0, full.accuracy)]
        found.append(self._reading("90% of its gain over the most frequent class", self.majority, full.accuracy))
        if probe is not None:
            found.append(self._reading("90% of its gain over a linear probe", probe.accuracy, full.accuracy))
        return found

    def _reading(self, what: str, baseline: float, full: float) -> Reading:
        threshold = baseline + SHARE * (full - baseline)
        below: Run | None = None
        for run in self.curve():
            assert run.dims is not None
            if run.accuracy >= threshold - 1e-12:  # both are quotients of small integers
                crossing = float(run.dims)
                if below is not None and below.dims:
                    share = (threshold - below.accuracy) / (run.accuracy - below.accuracy)
                    crossing = math.exp(math.log(below.dims) + share * math.log(run.dims / below.dims))
                return Reading(what, threshold, run.dims, None if below is None else below.dims, crossing)
            below = run
        return Reading(what, threshold, None, None if below is None else below.dims, None)

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON-able values."""
        return {**asdict(self), "readings": [asdict(reading) for reading in self.readings()]}

    @staticmethod
    def read(path: Path) -> IntrinsicReport:
        """What `write` wrote. Raises CheckpointError naming the file if it is something else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("readings")
            content["runs"] = [Run(**run) for run in content["runs"]]
            return IntrinsicReport(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); remove it to begin anew") from error

    def write(self, directory: Path) -> None:
        """intrinsic.json and, with matplotlib and two runs at least, intrinsic.svg; whole or not at all."""
        from io import BytesIO

        from .plots import plot_intrinsic

        content = self.to_dict()
        with Staging(directory) as staging:
            staging.write(JSON_NAME, (json.dumps(content, indent=1) + "\n").encode())
            if len(self.curve()) > 1:
                picture = BytesIO()
                try:
                    plot_intrinsic(content, picture)
                    staging.write("intrinsic.svg", picture.getvalue())
                except ImportError:
                    pass
            staging.commit()

    def table(self) -> Table:
        """A row a run, for `rich.print`."""
        from rich.table import Table

        table = Table()
        table.add_column("what moves")
        for name in ("trained", "of all", "lr", "training loss", "held-out loss", "accuracy", "of full's"):
            table.add_column(name, justify="right")
        full, probe = self.run(FULL), self.run(PROBE)
        table.add_row("most frequent class", "0", "", "", "", "", f"{self.majority:.1%}", "")
        ordered = [run for run in (probe, *self.curve(), full) if run is not None]
        for run in ordered:
            what = {FULL: "everything", PROBE: "the head alone"}.get(run.name) or f"d = {run.dims:,}"
            share = "" if full is None else f"{run.accuracy / full.accuracy:.1%}"
            table.add_row(
                what, f"{run.trained:,}", f"{run.trained / self.size:.2%}", f"{run.lr:.1e}", f"{run.train_loss:.3f}",
                f"{run.loss:.3f}", f"{run.accuracy:.1%}", share,
            )  # fmt: skip
        return table


def intrinsic(
    model: TextClassifier,
    train: Labelled,
    held_out: Labelled,
    out: str | os.PathLike[str],
    config: IntrinsicConfig | None = None,
    *,
    dims: tuple[int, ...] = DIMS,
    seconds: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> IntrinsicReport:
    """Train a classifier in random subspaces, in full, and its head alone, and see which d comes near full fine-tuning.

    After every run the report is written; the same call goes on with those that are missing, and a call with other dims
    adds to them.

    Args:
        model: as it is before training, in fp32; it is copied for each run.
        train, held_out: texts of the same classes.
        out: a directory for intrinsic.json and intrinsic.svg.
        dims: of the subspaces, each at most the model's size, in the order in which they are trained.
        seconds: no further run begins after so long; the report then says that it is not complete.
        progress: called with (run, how many are done, how many there are) before each and at the end.

    Raises:
        ValueError: dims or data that do not fit the model.
        DestinationExistsError: `out` holds a sweep of another model, other data or another configuration.
        KeyboardInterrupt: after Ctrl-C, with the runs before it kept.
    """
    config = config or IntrinsicConfig()
    out = Path(out)
    if train.names != held_out.names:
        raise ValueError("held_out: its classes are not those of train; read it with names=train.names")
    if not len(held_out):
        raise ValueError("held_out is empty; there is nothing to measure")
    unused = _unused(model, train)
    size = sum(p.numel() for name, p in model.named_parameters() if name not in unused and _moves(name, config))
    groups = len(_subspace(copy.deepcopy(model), size, config, unused).groups) if config.structure else 0
    if not dims or any(type(d) is not int or not groups < d <= size for d in dims):
        raise ValueError(f"dims must be integers above {groups} and at most {size:,}, got {', '.join(map(str, dims))}")
    counts = train.labels.bincount(minlength=model.classes)
    majority = float((held_out.labels == counts.argmax()).double().mean())
    settings = {
        **asdict(config),
        "model": fingerprint(model.parameters()),
        "train": fingerprint(train.tensors()),
        "held_out": fingerprint(held_out.tensors()),
    }
    report = IntrinsicReport(size, model.classes, len(train), len(held_out), majority, settings, unused=unused)
    _take_up(report, out)
    wanted = [FULL, PROBE, *map(str, dict.fromkeys(dims))]
    started = time.monotonic()
    for done, name in enumerate(wanted):
        if report.run(name) is not None:
            continue
        if seconds is not None and time.monotonic() - started > seconds:
            break
        if progress is not None:
            progress(name, done, len(wanted))
        report.runs.append(_train(name, copy.deepcopy(model), train, held_out, config, unused))
        report.complete = all(report.run(name) is not None for name in wanted)
        report.write(out)
    report.complete = all(report.run(name) is not None for name in wanted)
    if progress is not None:
        progress("", len(wanted), len(wanted))
    return report


def _moves(name: str, config: IntrinsicConfig) -> bool:
    return config.head == "subspace" or not name.startswith("head.")


def _unused(model: TextClassifier, data: Labelled) -> list[str]:
    """Parameters that get no gradient from a batch, such as those of a pooler that is not read."""
    probe = copy.deepcopy(model)
    train_all(probe)
    # A head of zeros passes no gradient on.
    torch.nn.init.ones_(probe.head.weight)
    ClassificationLoss(probe)(data.take(range(min(2, len(data))))).backward()
    return [name for name, parameter in probe.named_parameters() if parameter.grad is None]


def _take_up(report: IntrinsicReport, out: Path) -> None:
    """The runs of an earlier call of the same sweep."""
    path = out / JSON_NAME
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise DestinationExistsError(f"{out}: is not empty and holds no sweep; a new or empty directory is needed")
        return
    before = IntrinsicReport.read(path)
    for key, value in report.settings.items():
        if before.settings.get(key) != value:
            told = "another one" if key in ("model", "train", "held_out") else f"{before.settings.get(key)!r}"
            raise DestinationExistsError(f"{path}: holds a sweep whose {key} is {told}; give another directory")
    report.runs = before.runs


def _subspace(model: TextClassifier, dims: int, config: IntrinsicConfig, unused: list[str]) -> Subspace:
    left = [n for n, _ in model.named_parameters() if n in unused or not _moves(n, config)]
    return add_subspace(model, dims, seed=config.seed, structure=config.structure, exclude=left)


def _train(
    name: str, model: TextClassifier, train: Labelled, held_out: Labelled, config: IntrinsicConfig, unused: list[str]
) -> Run:
    dims: int | None = None
    if name == FULL:
        train_all(model)
        lr, head_lr = config.lr, config.head_lr
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(path not in unused)
    elif name == PROBE:
        dims, lr, head_lr = 0, config.head_lr, config.head_lr
        train_only(model, "head")
    else:
        dims = int(name)
        model.requires_grad_(False)
        size = _subspace(model, dims, config, unused).size
        model.head.requires_grad_(config.head == "trained")
        lr, head_lr = config.subspace_lr(dims, size), config.head_lr
    started = time.monotonic()
    training = config.training(lr, len(train), int(train.starts.diff().max()), head_lr)
    report = finetune(model, train, training, show=False)
    if report.interrupted:
        raise KeyboardInterrupt
    found = accuracy(model, held_out, 64)
    last = report.losses[-max(1, len(report.losses) // 10) :]
    return Run(
        name, dims, report.trainable_parameters, lr, found.accuracy, found.loss, sum(last) / len(last),
        time.monotonic() - started,
    )  # fmt: skip
