"""The training loop: data in, a trained adapter out. Reads top to bottom."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..checkpoint.writer import StorageFullError, full_disk_names
from ..nn.adapters import acting_parameters, adapted_modules, adapter_names, adapter_parameters, require_names
from . import state
from .config import TrainConfig, learning_rate
from .distributed.launch import idle_cores, open_world
from .distributed.world import ALONE, World
from .interrupt import Interrupt
from .metrics import Display, MetricsFile, peak_memory_bytes
from .mode import autocast, checkpointing, training_mode, weights_dtype
from .optim import clip_scale
from .optimization import RunningMean, clipped_step, make_optimizer, set_learning_rate
from .plot import plot_loss
from .prepare import make_task
from .report import Evaluation, Recorder, TrainReport, best_of
from .run_directory import ADAPTER, BEST, RunDirectory, environment, fingerprint, model_fingerprint, start_fingerprint
from .tasks import Task

Save = Callable[[nn.Module, Path], None]


class NonFiniteLossError(ValueError):
    """The loss or the gradient became NaN or infinite; `step` (1 is the first) is where."""

    def __init__(self, step: int, what: str, value: float, lr: float) -> None:
        super().__init__(
            f"step {step}: the {what} is {value}, training stopped (learning rate {lr:.3g}); no adapter was saved. "
            "A lower lr, a longer warm-up or dtype='fp32' may help"
        )
        self.step = step


def finetune(
    model: nn.Module,
    data: Any,
    config: TrainConfig | None = None,
    *,
    tokenizer: Any = None,
    eval_data: Any = None,
    save: Save | None = None,
    show: bool = True,
    console: Console | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainReport:
    """Train what is trainable in the model, of its adapters those that act, and return a report.

    Args:
        model: a causal language model, transformers' or any nn.Module from ids [B, T] to logits [B, T, vocabulary], for
            next-token prediction; or a `TextClassifier` for labelled data. It is trained in place and left in the mode
            it was in. Put an adapter on it first (`nybble.add_lora` and its siblings).
        data: a text file, a JSONL file, a directory of them, a list of documents or of rows, or token ids [n]; see
            `nybble.training.data`. A mapping {adapter name: data} trains these adapters at once, each on rows of its
            own in the same batch, as `batch_size` rows of each; each ends where a run of its own would.
        tokenizer: turns text into ids; not needed for token ids.
        eval_data: held-out data in the same forms, instead of config.val_fraction.
        save: writes what was trained into a directory; by default `nybble.save_adapter` (PEFT's layout).
        on_step: called with (step, loss) after each optimizer step.

    With config.out_dir, writes adapter/ (adapter/NAME/ of several), metrics.jsonl and loss.png there, and while it runs
    checkpoints. A run that was interrupted, by Ctrl-C, a kill or a power cut, goes on where it was when the same call
    is made again, and comes to the same bits on the same machine with the same number of threads. Ctrl-C ends the run
    after the step in progress and saves; a second one ends it at once.

    Several processes that make the same call, started by torchrun or with a process group of their own, train together
    (config.parallel): each computes its part of every batch, and losses and gradients are those of one process, up to
    the order of sums. The first one writes and shows; a checkpoint goes on with any number of processes. Ctrl-C or
    SIGTERM of any one stops all after the same step. With parallel="fsdp" the model is left sharded: use what was
    saved.

    Raises ValueError for data, config or a model that do not fit together, DestinationExistsError when out_dir is not
    empty and holds no unfinished run of the same settings and data, NonFiniteLossError when the loss or the gradient is
    NaN or infinite, PeerError when another process of the run failed.
    """
    config = config or TrainConfig()
    with ExitStack() as stack:
        world = stack.enter_context(open_world(config.parallel, model))
        with world.together():
            task, told = make_task(model, data, config, tokenizer, eval_data, world)
            parameters = _trained(model, task)
            checkpointing(model, config)  # refused before the work, not in it
            _check_results(model, config, save, task)
            world.check(model, parameters, config)
        world.align(model)
        total_steps = config.total_steps(task.sequences)
        out, found, notes = _open(model, config, task, parameters, world, stack, save is not None)
        report = TrainReport(trainable_parameters=sum(p.numel() for p in parameters.values()))
        report.metrics_path = None if out is None else out.metrics
        after = None if found is None else found.step
        board = out.board if out is not None and config.tensorboard else None
        metrics = stack.enter_context(closing(MetricsFile(report.metrics_path, after, board)))
        display = Display(total_steps, config.log_every, enabled=show and world.first, console=console)
        if found is None:
            metrics.write("config", **config.to_dict(), total_steps=total_steps, sequences=task.sequences)
        display.say(
            f"{report.trainable_parameters:,} trainable parameters; {task.sequences:,} sequences of {config.seq_len}; "
            f"{total_steps:,} steps of {config.sequences_per_step * len(task.groups):,} sequences"
        )
        if world.size > 1:
            share = config.batch_size // world.size
            display.say(f"{world.size} processes ({world.kind}), {share} rows of a batch each")
            idle = idle_cores() if next(model.parameters()).device.type == "cpu" else None
            if idle is not None:
                display.say(idle)
        for note in (*told, *notes):
            display.say(note)
        parameters = world.hold(model, parameters, weights_dtype(config))
        with torch.no_grad():
            world.run(task.prepare)
        run = Run(model, task, config, parameters, Recorder(report, metrics, display, config), out, save, world)
        with training_mode(model, config, keep_heap=world.kind != "fsdp"), display:
            found = world.spread(found)
            if found is not None:
                run.restore(found)
                display.say(f"goes on after step {found.step}")
            run.train(total_steps, on_step)
            if metrics.lost:
                display.say(f"{metrics.path} lacks {metrics.lost} rows: the disk was full")
        metrics.close()
        report.peak_memory_bytes = peak_memory_bytes(next(model.parameters()).device)
        if config.out_dir is not None:
            run.write_results(display)
        return report


class Run:
    """One run: what changes while it goes on, and the loop that changes it."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainConfig,
        parameters: Mapping[str, nn.Parameter],
        recorder: Recorder,
        out: RunDirectory | None = None,
        save: Save | None = None,
        world: World = ALONE,
    ) -> None:
        """parameters: what this process has of the trained ones. out: of the first process alone."""
        self.model, self.task, self.config, self.parameters = model, task, config, parameters
        self.recorder, self.report, self.out, self._save = recorder, recorder.report, out, save
        self.world = world
        self.device = next(iter(parameters.values())).device
        self.optimizer = make_optimizer(parameters, config, world.optimizer_options())
        self.mean = RunningMean(parameters, config.ema_decay)
        self.step = 0
        self._names = {id(p): name for name, p in parameters.items()}
        owned = [parameters if group is None else adapter_parameters(model, group) for group in task.groups]
        self._members = [[p for name, p in parameters.items() if name in names] for names in owned]

    def train(self, total_steps: int, on_step: Callable[[int, float], None] | None = None) -> None:
        """From the step after `self.step` to the last one."""
        config, report = self.config, self.report
        with Interrupt(launched=self.world.size > 1) as interrupt:
            # Of a run that is taken up too, if Ctrl-C came between a step and its evaluation.
            if self._evaluation_due() and all(e.step != self.step for e in report.evaluations):
                self.evaluate()
            while self.step < total_steps and not self._stops():
                loss = self.optimizer_step(total_steps)
                if on_step is not None:
                    on_step(self.step, loss)
                last = self.step == total_steps
                if self.world.any(interrupt.requested) and not last:
                    report.interrupted = True
                    self.checkpoint()
                    return
                if last or self._evaluation_due():
                    self.evaluate()
                if last or (config.save_every and self.step % config.save_every == 0) or self._stops():
                    self.checkpoint()
            report.stopped_early = self.step < total_steps

    def optimizer_step(self, total_steps: int) -> float:
        """One step of the optimizer; returns the mean loss before it."""
        config, task, world = self.config, self.task, self.world
        started = time.perf_counter()
        step = self.step + 1
        lr = learning_rate(self.step, total_steps, config)
        set_learning_rate(self.optimizer, lr)
        # Dropout is a function of (seed, step, process): a run that is taken up again draws what it would have drawn.
        torch.manual_seed(world.seed((config.seed * 1_000_003 + step) % (1 << 63)))

        # The sum over all micro-batches, of all processes, of losses divided by the step's targets: the mean of the
        # one big batch.
        first = self.step * config.sequences_per_step
        batches = [
            task.batch(first + micro * config.batch_size, config.batch_size, self.device)
            for micro in range(config.grad_accum)
        ]
        counted = world.sum(torch.stack([task.counted(batch) for batch in batches]).sum(0)).clamp(min=1)
        losses = torch.zeros(len(task.groups), device=self.device)
        for number, batch in enumerate(batches, 1):
            with task.acting(batch), world.gradients(last=number == len(batches)):
                with autocast(self.device, config):
                    part = world.run(task.losses, batch) / counted.to(self.device)
                part.sum().backward()
            losses += part.detach()
        losses = world.sum(losses)
        world.collect()

        # The same numbers in all processes: what one finds, all do.
        self._check_finite(step, "loss", losses.sum(), lr)
        clipping = [clip_scale(members, config.max_grad_norm or None, world.squares) for members in self._members]
        norms = torch.stack([norm for norm, _ in clipping])
        self._check_finite(step, "gradient's norm", norms.sum(), lr)
        clipped_step(self.optimizer, self._members, [factor for _, factor in clipping])
        self.optimizer.zero_grad(set_to_none=True)
        world.clear()
        self.mean.update()
        self.step = step

        by_group = dict(zip(task.groups, losses.tolist(), strict=True))
        tokens, norm = int(counted.sum()), float(norms.max())
        seconds = time.perf_counter() - started
        return self.recorder.step(step, total_steps, by_group, tokens, lr, norm, seconds, self.device)

    def evaluate(self) -> None:
        """The held-out loss, if there is held-out data; keeps the best."""
        with self.mean.in_place(), autocast(self.device, self.config):
            result = self.task.evaluate()
        if result is not None:
            best = self.recorder.evaluation(Evaluation(self.step, *result))
            if best and self.config.keep_best and self.step:
                self.report.best_dir = None  # until this one is there: best/ would be of another step
                self.report.best_dir = self._write_trained(BEST, partial(self._unless_full, "best/"))

    def _evaluation_due(self) -> bool:
        every = self.config.eval_every
        return self.step == 0 or (every > 0 and self.step % every == 0)

    def _stops(self) -> bool:
        patience = self.config.early_stopping
        return bool(patience) and self.recorder.stale >= patience

    def _check_finite(self, step: int, what: str, value: Tensor, lr: float) -> None:
        if not math.isfinite(value):
            raise NonFiniteLossError(step, what, float(value), lr)

    # ---- going on after an interruption ------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Write all that the next step depends on, if config wants checkpoints."""
        if self.config.out_dir is None or not self.config.save_every:
            return
        report = self.report
        tensors, numbers = state.optimizer_state(self.optimizer, self._names)
        tensors |= {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"mean.{name}": value for name, value in self.mean.values.items()}
        tensors["losses"] = torch.tensor(report.losses, dtype=torch.float64)
        for name, losses in report.adapter_losses.items():
            tensors[f"losses.{name}"] = torch.tensor(losses, dtype=torch.float64)
        facts = {
            "optimizer": numbers,
            "evaluations": [[e.step, e.loss, e.accuracy] for e in report.evaluations],
            "tokens": report.tokens,
            "seconds": report.seconds,
            "environment": {**environment(), **self.world.facts()},
        }
        self.recorder.metrics.sync()  # its rows up to here are not written again

        def write(whole: Mapping[str, Any]) -> None:
            assert self.out is not None
            snapshot = state.Snapshot(self.step, whole, facts)
            save = partial(state.save, self.out.checkpoints, snapshot, self.config.keep_checkpoints)
            self._unless_full("checkpoint", save)

        self.world.write(tensors, write)

    def _unless_full(self, what: str, write: Callable[[], Path]) -> Path | None:
        """What write() returns; None where the disk is full, which is told, and no reason to lose what was trained."""
        try:
            return self._with_room(write)
        except StorageFullError as error:
            self.recorder.display.say(f"no {what} of step {self.step}, the run goes on without: {error.strerror}")
            return None

    def _with_room(self, write: Callable[[], Path]) -> Path:
        """write(); on a full disk once more, without the checkpoints that only stand in for a damaged one."""
        assert self.out is not None
        try:
            with full_disk_names(self.out.path):
                return write()
        except StorageFullError:
            if not state.keep_newest(self.out.checkpoints):
                raise
            with full_disk_names(self.out.path):
                return write()

    def restore(self, found: state.Snapshot) -> None:
        """Be where the run was when it wrote the checkpoint."""
        report, facts = self.report, found.facts
        state.copy_into(self.parameters, found.tensors, "parameter")
        state.copy_into(self.mean.values, found.tensors, "mean")
        state.restore_optimizer(self.optimizer, self._names, found.tensors, facts["optimizer"])
        report.losses = found.tensors["losses"].tolist()
        report.adapter_losses = {
            name.removeprefix("losses."): values.tolist()
            for name, values in found.tensors.items()
            if name.startswith("losses.")
        }
        report.evaluations = [Evaluation(*row) for row in facts["evaluations"]]
        report.best = best_of(report.evaluations)
        report.tokens, report.seconds, report.resumed_from = facts["tokens"], facts["seconds"], found.step
        self.step = found.step
        if self.out is not None and (self.out.path / BEST).is_dir():
            report.best_dir = self.out.path / BEST
        here = {**environment(), **self.world.facts()}
        there = {**ALONE.facts(), **facts["environment"]}
        changed = [
            f"{key} was {there.get(key)!r}, is {value!r}" for key, value in here.items() if there.get(key) != value
        ]
        if changed:
            self.recorder.display.say(
                f"not where the run began ({'; '.join(changed)}): it goes on, but not to the same bits"
            )

    # ---- results -----------------------------------------------------------------------------------------------------

    def write_results(self, display: Display) -> None:
        """adapter/ and loss.png; then what only a continuation needs is removed, unless there is to be one."""
        report = self.report
        report.adapter_dir = self._write_trained(ADAPTER, self._or_say_what_is_left)
        report.plot_path = self.world.from_first(self._finish)
        stopped = f"stopped after step {len(report.losses)} of {display.total_steps}; " if report.interrupted else ""
        display.say(f"{stopped}saved in {report.adapter_dir}")

    def _finish(self) -> Path | None:
        """The plot, if there is to be one; nothing is left that only a continuation needs."""
        report, out = self.report, self.out
        assert out is not None
        plotted = None
        if self.config.plot:
            evaluations = [(e.step, e.loss) for e in report.evaluations]
            plotted = self._unless_full("loss.png", partial(plot_loss, report.losses, evaluations, out.plot))
        if not (report.interrupted and self.config.save_every):
            out.finish()
        return plotted

    def _or_say_what_is_left(self, write: Callable[[], Path]) -> Path:
        """What write() returns; the error of a full disk tells what became of the work."""
        assert self.out is not None
        try:
            return self._with_room(write)
        except StorageFullError as error:
            last = next(iter(state.newest(self.out.checkpoints)), None)
            error.outcome = (
                "no adapter was saved; the model itself is trained"
                if last is None
                else f"no adapter was saved; make room, and the same call goes on from {last.name}"
            )
            raise

    def _write_trained(self, name: str, guarded: Callable[[Callable[[], Path]], Path | None]) -> Path | None:
        """Have what is trained written into out_dir/name, by `guarded`, which is given what writes."""

        def write() -> Path | None:
            assert self.out is not None
            return guarded(partial(self.out.write, name, self._save_into))

        # What a caller's own function saves is not known: it gets the model whole.
        names = list(self.parameters) if self._save is None else None
        with self.mean.in_place(), self.world.assembled(self.model, names):
            return self.world.from_first(write)

    def _save_into(self, directory: Path) -> None:
        if self._save is not None:
            self._save(self.model, directory)
            return
        from ..checkpoint.peft import save_adapter

        for group in self.task.groups:
            save_adapter(self.model, directory if group is None else directory / group, name=group)


def _trained(model: nn.Module, task: Task) -> dict[str, nn.Parameter]:
    """What this run trains, by name."""
    groups = [group for group in task.groups if group is not None]
    require_names(model, groups)
    if groups:
        parameters = {
            name: p for group in groups for name, p in adapter_parameters(model, group).items() if p.requires_grad
        }
    else:
        modules = adapted_modules(model).values()
        if any(module.selection.rows is not None for module in modules):
            raise ValueError(
                "model: adapters were chosen row by row; choose one to train with nybble.set_adapter, or give data as "
                "a mapping {adapter name: data} to train several at once"
            )
        parameters = acting_parameters(model)
    if not parameters:
        idle = adapter_names(model)
        if idle and not groups:
            raise ValueError(
                f"model has no trainable parameter that acts: its adapters are {', '.join(map(repr, idle))}; choose "
                "one with nybble.set_adapter, and requires_grad_ it if it was frozen"
            )
        raise ValueError("model has no trainable parameter; call nybble.add_lora(model, ...) first")
    return parameters


def _check_results(model: nn.Module, config: TrainConfig, save: Save | None, task: Task) -> None:
    """Before the work, what would fail after it: something to save, matplotlib."""
    if (config.early_stopping or config.keep_best) and not task.has_held_out:
        raise ValueError("early_stopping and keep_best need held-out data: give eval_data or val_fraction")
    if config.out_dir is None:
        return
    if save is None:
        from ..checkpoint.peft import check_saveable

        for group in task.groups:
            check_saveable(model, group)
    if config.plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the loss plot needs matplotlib: pip install 'nybble[plot]', or plot=False")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ImportError("tensorboard=True needs the package tensorboard: pip install tensorboard")


def _open(
    model: nn.Module,
    config: TrainConfig,
    task: Task,
    parameters: Mapping[str, nn.Parameter],
    world: World,
    stack: ExitStack,
    own_save: bool,
) -> tuple[RunDirectory | None, state.Snapshot | None, list[str]]:
    """(the directory, to be closed by `stack`; the checkpoint to go on from; what to tell of damaged ones), of the
    first process. Raises ValueError where processes were not given the same."""
    if config.out_dir is None and world.size == 1:
        return None, None, []
    identity = {
        "config": config.identity(),
        "data": fingerprint(task.tensors()),
        "model": model_fingerprint(model, parameters),
        "trained": {name: f"{weights_dtype(config) or p.dtype} {list(p.shape)}" for name, p in parameters.items()},
    }
    start = start_fingerprint(model, parameters, weights_dtype(config))
    # Also what does not change a result, where processes would wait for each other for ever.
    free = {"parallel": world.kind, "save_every": config.save_every, "out_dir": config.out_dir is not None}
    same = {f"config.{name}": value for name, value in (config.identity() | free).items()}
    same |= {name: value for name, value in identity.items() if name != "config"} | {"trained weights": start}
    world.agree({name: str(value) for name, value in {**same, "function that saves": own_save}.items()})
    out = None
    with world.together():
        if config.out_dir is not None and world.first:
            out = RunDirectory(Path(config.out_dir), identity, start)
            stack.enter_context(closing(out))
    if out is None:
        return None, None, []
    found = "the beginning" if out.found is None else f"step {out.found.step}"
    notes = [f"passed over a checkpoint: {text}; the run goes on from {found}" for text in out.damaged]
    if out.found is not None and not out.same_start:
        notes.append(
            "the model's weights are not those that the run began with; those of its checkpoint take their place"
        )
    return out, out.found, notes
