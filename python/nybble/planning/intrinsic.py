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
from ..training.classifier import Accuracy, ClassificationLoss, TextClassifier, accuracy
from ..training.config import TrainConfig
from ..training.data import Labelled
from ..training.loop import NonFiniteLossError, finetune
from ..training.run_directory import environment, fingerprint

if TYPE_CHECKING:
    from rich.table import Table

JSON_NAME = "intrinsic.json"
DIMS = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
SHARE = 0.9
FULL, PROBE = "full", "probe"
#: Learning rates that a search tries at most beyond those that it is given.
BEYOND = 3


@dataclass(frozen=True)
class IntrinsicConfig:
    """How every run of the sweep trains; all see the same texts in the same order.

    Attributes:
        epochs, batch_size, seed: as in `TrainConfig`; the schedule is cosine after a warm-up of 6% of the steps. dtype:
            "fp32" (movements in a subspace are smaller than what bf16 can add to a weight) or "bf16".
        step: of a run in a subspace: see `subspace_lr`, where its search begins. The default is for a model of 23 M
            (MiniLM: after 20 steps at d = 3,000 the loss was 2.90 with 16, 3.69 with 4).
        lr: of full fine-tuning, where its search begins. head_lr: of the new head, there (it is not searched for) and
            beside a subspace if head is "trained"; for the probe, where the search begins.
        head: "subspace": the head moves in the subspace with the rest, and d is all that is trained. "trained": it is
            trained in full beside it, and d is what the encoder has.
        structure: SAID, a scale for each block (`add_subspace`). scale_lr: the learning rate of these scales, whatever
            that of z, which is of the order of one and would turn a scale about in a few steps.
        rates: the learning rates that are tried for every run, as factors of where its search begins: no rate suits all
            d, nor a subspace and the whole model. (1.0,): no search. Each is judged by the loss on a share
            `tune_fraction` of the training texts, from their end, after training on the others; while the best is the
            lowest or the highest, the next one beyond it is tried, `BEYOND` times at most. The run that counts then
            trains on all training texts at the best rate. The held-out texts have no part in this.
        tune_epochs: passes of each trial; None: as many as `epochs`. Fewer cost less and favour higher rates.
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
    scale_lr: float = 1e-2
    rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    tune_fraction: float = 0.1
    tune_epochs: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field."""
        if self.head not in ("subspace", "trained"):
            raise ValueError(f"head must be 'subspace' or 'trained', got {self.head!r}")
        for name in ("step", "head_lr", "scale_lr"):
            if not _positive(getattr(self, name)):
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)!r}")
        rates = self.rates
        if not isinstance(rates, tuple | list) or not rates or not all(map(_positive, rates)):
            raise ValueError(f"rates must be one or more numbers above 0, got {rates!r}")
        object.__setattr__(self, "rates", tuple(sorted({float(rate) for rate in rates})))
        if not _positive(self.tune_fraction) or not self.tune_fraction < 1:
            raise ValueError(f"tune_fraction must be a number above 0 and below 1, got {self.tune_fraction!r}")
        if self.tune_epochs is not None and not _positive(self.tune_epochs):
            raise ValueError(f"tune_epochs must be a number above 0 or None, got {self.tune_epochs!r}")
        self.training(self.lr, 1, 1)

    @property
    def searches(self) -> bool:
        """Whether there is a choice of learning rates."""
        return len(self.rates) > 1

    def subspace_lr(self, dims: int, size: int) -> float:
        """The learning rate of z: step / sqrt(d), so that a step of Adam, which moves every number by about the rate,
        moves the model as far for every d; but no more than lr * size / d, which for d = size is that of full
        fine-tuning. Measured on MiniLM: 16 / sqrt(d) learns at d = 10,000, and at 100,000, where it is twice the
        second bound, comes to no more than the most frequent class."""
        return min(self.step / math.sqrt(dims), self.lr * size / dims)

    def training(
        self, lr: float, texts: int, longest: int, head_lr: float | None = None, epochs: float | None = None
    ) -> TrainConfig:
        """Of a run with this learning rate on so many texts, the longest of so many tokens."""
        config = TrainConfig(
            epochs=self.epochs if epochs is None else epochs, batch_size=self.batch_size, seq_len=longest,
            seed=self.seed, dtype=self.dtype, lr=lr, head_lr_ratio=1.0 if head_lr is None else head_lr / lr,
        )  # fmt: skip
        steps = config.total_steps(texts)
        return TrainConfig(**{**asdict(config), "warmup_steps": max(1, round(0.06 * steps))})


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried for the run `name`: `factor` times that where the search begins.

    accuracy and loss are on the training texts that the trial did not train on; infinite where the rate was too high.
    """

    name: str
    factor: float
    lr: float
    accuracy: float
    loss: float
    train_loss: float
    seconds: float


@dataclass(frozen=True)
class Run:
    """One run: `dims` 0 for the probe, None for full fine-tuning; accuracy and loss are on the held-out texts,
    train_loss is the mean of the last tenth of the steps."""

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
        threshold: the accuracy to reach. error: the standard error of an accuracy's distance from it, from the number
            of held-out texts; full fine-tuning and the subspace are taken for independent. d90: the least d of the
            sweep that reaches it; None if none does. below: the largest d of the sweep under d90, None if d90 is the
            smallest. crossing: where the line between these two, over log d, meets the threshold.
    """

    what: str
    threshold: float
    error: float
    d90: int | None
    below: int | None
    crossing: float | None


@dataclass
class IntrinsicReport:
    """Returned by `intrinsic`.

    Attributes:
        size: numbers of the model that move with z. majority: accuracy of the training texts' most frequent class.
        settings: what all runs have in common. trials: the search for each run's learning rate. about: what the caller
            tells of model and data, and of the software. unused: parameters that the model's output does not depend on.
        complete: whether every run of the sweep is there.
    """

    size: int
    classes: int
    texts: int
    held_out: int
    majority: float
    settings: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    complete: bool = False

    def run(self, name: str) -> Run | None:
        """The run of this name: "full", "probe", or the number of dimensions."""
        return next((run for run in self.runs if run.name == name), None)

    def tried(self, name: str) -> list[Trial]:
        """The learning rates that were tried for the run of this name."""
        return [trial for trial in self.trials if trial.name == name]

    def standard_error(self, accuracy: float) -> float:
        """Of an accuracy on the held-out texts, from their number alone: not from what another seed would give."""
        return math.sqrt(accuracy * (1 - accuracy) / self.held_out)

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
        # threshold - accuracy is linear in full's accuracy, with SHARE as its factor.
        error = math.hypot(SHARE * self.standard_error(full), self.standard_error(threshold))
        below: Run | None = None
        for run in self.curve():
            assert run.dims is not None
            if run.accuracy >= threshold - 1e-12:  # both are quotients of small integers
                crossing = float(run.dims)
                if below is not None and below.dims:
                    share = (threshold - below.accuracy) / (run.accuracy - below.accuracy)
                    crossing = math.exp(math.log(below.dims) + share * math.log(run.dims / below.dims))
                return Reading(what, threshold, error, run.dims, None if below is None else below.dims, crossing)
            below = run
        return Reading(what, threshold, error, None, None if below is None else below.dims, None)

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON-able values."""
        content = asdict(self)
        for trial in content["trials"]:
            for key in ("loss", "train_loss"):
                trial[key] = trial[key] if math.isfinite(trial[key]) else None  # JSON has no infinity
        return {**content, "readings": [asdict(reading) for reading in self.readings()]}

    @staticmethod
    def read(path: Path) -> IntrinsicReport:
        """What `write` wrote. Raises CheckpointError naming the file if it is something else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("readings")
            content["runs"] = [Run(**run) for run in content["runs"]]
            content["trials"] = [
                Trial(**{**trial, **{k: math.inf for k in ("loss", "train_loss") if trial[k] is None}})
                for trial in content.get("trials", [])
            ]
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
                f"{run.loss:.3f}", f"{run.accuracy:.1%} ± {self.standard_error(run.accuracy):.1%}", share,
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
    about: dict[str, Any] | None = None,
) -> IntrinsicReport:
    """Train a classifier in random subspaces, in full, and its head alone, and see which d comes near full fine-tuning.

    Each of them has a search for its learning rate first. After every trial and run the report is written; the same
    call goes on with those that are missing, and a call with other dims adds to them.

    Args:
        model: as it is before training, in fp32; it is copied for each run.
        train, held_out: texts of the same classes.
        out: a directory for intrinsic.json and intrinsic.svg.
        dims: of the subspaces, each at most the model's size, in the order in which they are trained.
        seconds: no further run begins after so long; the report then says that it is not complete.
        progress: called with (run, how many are done, how many there are) before each and at the end.
        about: JSON-able values that are kept in the report, such as where model and data are from.

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
    tuning = _tuning(train, config)
    settings: dict[str, Any] = {
        **asdict(config),
        "rates": list(config.rates),
        "pooling": model.pooling,
        "model": fingerprint(model.parameters()),
        "train": fingerprint(train.tensors()),
        "held_out": fingerprint(held_out.tensors()),
    }
    told = {**(about or {}), **environment()}
    if not config.structure:
        del settings["scale_lr"]  # there are no scales
    report = IntrinsicReport(
        size, model.classes, len(train), len(held_out), majority, settings, unused=unused, about=told
    )
    _take_up(report, out)
    wanted = [FULL, PROBE, *map(str, dict.fromkeys(dims))]
    started = time.monotonic()
    for done, name in enumerate(wanted):
        if report.run(name) is not None:
            continue
        while config.searches and (untried := _next_rate(report, name, config)) is not None:
            if seconds is not None and time.monotonic() - started > seconds:
                return report
            if progress is not None:
                progress(f"{name}: rate x {untried:g}", done, len(wanted))
            report.trials.append(_try(name, untried, model, tuning, config, unused))
            report.write(out)
        trials = report.tried(name)
        factor = min(trials, key=lambda trial: trial.loss).factor if trials else config.rates[0]
        if seconds is not None and time.monotonic() - started > seconds:
            return report
        if progress is not None:
            progress(name, done, len(wanted))
        report.runs.append(_train(name, factor, copy.deepcopy(model), train, held_out, config, unused))
        report.complete = all(report.run(name) is not None for name in wanted)
        report.write(out)
    report.complete = all(report.run(name) is not None for name in wanted)
    if progress is not None:
        progress("", len(wanted), len(wanted))
    return report


def _tuning(train: Labelled, config: IntrinsicConfig) -> tuple[Labelled, Labelled] | None:
    """(texts that trials train on, texts that they are judged by); None without a search."""
    if not config.searches:
        return None
    least, rest = max(1, round(len(train) * config.tune_fraction)), len(train)
    if least >= rest:
        raise ValueError(f"tune_fraction={config.tune_fraction} of {rest} training texts leaves none to train on")
    first, last = train.split(config.tune_fraction)
    assert last is not None
    return first, last


def _next_rate(report: IntrinsicReport, name: str, config: IntrinsicConfig) -> float | None:
    """The factor to try next for this run; None when the search is at its end."""
    trials = report.tried(name)
    tried = sorted(trial.factor for trial in trials)
    for factor in config.rates:
        if factor not in tried:
            return factor
    if len(tried) >= len(config.rates) + BEYOND:
        return None
    best = min(trials, key=lambda trial: trial.loss)
    if best.factor == tried[-1]:
        return best.factor * tried[-1] / tried[-2]
    if best.factor == tried[0]:
        return best.factor * tried[0] / tried[1]
    return None


def _positive(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < math.inf


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
    report.runs, report.trials = before.runs, before.trials


def _subspace(model: TextClassifier, dims: int, config: IntrinsicConfig, unused: list[str]) -> Subspace:
    left = [n for n, _ in model.named_parameters() if n in unused or not _moves(n, config)]
    return add_subspace(model, dims, seed=config.seed, structure=config.structure, exclude=left)


def _prepare(
    name: str, factor: float, model: TextClassifier, config: IntrinsicConfig, unused: list[str]
) -> tuple[int | None, float, float]:
    """Let of the model move what the run `name` trains. (dims, learning rate, that of the head.)"""
    if name == FULL:
        train_all(model)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(path not in unused)
        return None, factor * config.lr, config.head_lr
    if name == PROBE:
        train_only(model, "head")
        return 0, factor * config.head_lr, factor * config.head_lr
    dims = int(name)
    model.requires_grad_(False)
    subspace = _subspace(model, dims, config, unused)
    lr = factor * config.subspace_lr(dims, subspace.size)
    subspace.scale_step = config.scale_lr / lr
    model.head.requires_grad_(config.head == "trained")
    return dims, lr, config.head_lr


def _try(
    name: str,
    factor: float,
    model: TextClassifier,
    tuning: tuple[Labelled, Labelled] | None,
    config: IntrinsicConfig,
    unused: list[str],
) -> Trial:
    assert tuning is not None
    started = time.monotonic()
    model = copy.deepcopy(model)
    _, lr, head_lr = _prepare(name, factor, model, config, unused)
    epochs = config.epochs if config.tune_epochs is None else config.tune_epochs
    try:
        _, train_loss = _fit(model, tuning[0], config, lr, head_lr, epochs)
        found = accuracy(model, tuning[1], 64)
    except NonFiniteLossError:
        train_loss, found = math.inf, Accuracy(0.0, math.inf)
    loss = found.loss if math.isfinite(found.loss) else math.inf
    return Trial(name, factor, lr, found.accuracy, loss, train_loss, time.monotonic() - started)


def _train(
    name: str,
    factor: float,
    model: TextClassifier,
    train: Labelled,
    held_out: Labelled,
    config: IntrinsicConfig,
    unused: list[str],
) -> Run:
    started = time.monotonic()
    dims, lr, head_lr = _prepare(name, factor, model, config, unused)
    trained, train_loss = _fit(model, train, config, lr, head_lr, config.epochs)
    found = accuracy(model, held_out, 64)
    return Run(name, dims, trained, lr, found.accuracy, found.loss, train_loss, time.monotonic() - started)


def _fit(
    model: TextClassifier, data: Labelled, config: IntrinsicConfig, lr: float, head_lr: float, epochs: float
) -> tuple[int, float]:
    """Train. (Numbers that were trained, mean loss of the last tenth of the steps.)"""
    training = config.training(lr, len(data), int(data.starts.diff().max()), head_lr, epochs)
    report = finetune(model, data, training, show=False)
    if report.interrupted:
        raise KeyboardInterrupt
    last = report.losses[-max(1, len(report.losses) // 10) :]
    return report.trainable_parameters, sum(last) / len(last)
