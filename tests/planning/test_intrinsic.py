"""The sweep over the dimensions of a subspace: what is trained, readings, going on, what is refused."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import bert

from nybble.errors import CheckpointError, DestinationExistsError
from nybble.nn import train_all
from nybble.planning import intrinsic as module
from nybble.planning.intrinsic import BEYOND, IntrinsicConfig, IntrinsicReport, Run, Trial, intrinsic
from nybble.planning.plots import plot_intrinsic
from nybble.training import TextClassifier, TrainConfig
from nybble.training.data import Labelled
from nybble.training.loop import NonFiniteLossError
from nybble.training.optimization import make_optimizer, set_learning_rate

#: One learning rate, so that a sweep here is four runs.
CONFIG = IntrinsicConfig(epochs=1, batch_size=8, step=2.0, lr=1e-3, head_lr=1e-2, rates=(1.0,))


def texts(count: int, seed: int) -> Labelled:
    """Texts of 6 tokens whose class is their first token's remainder."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 200, (count, 6), generator=generator)
    return Labelled(ids.reshape(-1).int(), torch.arange(0, 6 * count + 1, 6), ids[:, 0] % 3, ("a", "b", "c"))


def classifier(pooler: bool = False) -> TextClassifier:
    return TextClassifier(bert(pooler=pooler), 3)


def sweep(out: Path, config: IntrinsicConfig = CONFIG, **options: Any) -> IntrinsicReport:
    return intrinsic(classifier(), texts(48, 0), texts(30, 1), out, config, **{"dims": (5, 50), **options})


def test_every_run_is_told_and_kept(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = sweep(tmp_path / "out", progress=lambda *call: seen.append(call))
    assert [run.name for run in report.runs] == ["full", "probe", "5", "50"] and report.complete
    assert seen == [("full", 0, 4), ("probe", 1, 4), ("5", 2, 4), ("50", 3, 4), ("", 4, 4)]
    assert report.size == sum(p.numel() for p in classifier().parameters())
    assert [run.trained for run in report.runs] == [report.size, 64 * 3 + 3, 5, 50]
    assert [run.dims for run in report.runs] == [None, 0, 5, 50]
    assert report.runs[2].lr == pytest.approx(2.0 / 5**0.5)
    labels = texts(48, 0).labels.bincount()
    assert report.majority == pytest.approx(float((texts(30, 1).labels == labels.argmax()).float().mean()))
    content = json.loads((tmp_path / "out" / "intrinsic.json").read_text())
    assert content == json.loads(json.dumps(report.to_dict()))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["intrinsic.json", "intrinsic.svg"]
    assert IntrinsicReport.read(tmp_path / "out" / "intrinsic.json") == report
    # A subspace of all that the model has starts with the same loss, and runs repeat to the bit.
    again = sweep(tmp_path / "again")
    assert [run.accuracy for run in again.runs] == [run.accuracy for run in report.runs]
    assert [run.train_loss for run in again.runs] == [run.train_loss for run in report.runs]


def test_a_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    real = module._train

    def watched(name: str, *arguments: Any) -> Run:
        if name == "5" and len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(name)
        return real(name, *arguments)

    monkeypatch.setattr(module, "_train", watched)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "out")
    assert not IntrinsicReport.read(tmp_path / "out" / "intrinsic.json").complete
    trained.append("again")
    report = sweep(tmp_path / "out")
    assert trained == ["full", "probe", "again", "5", "50"] and report.complete
    assert [run.name for run in sweep(tmp_path / "out", dims=(5, 7)).runs] == ["full", "probe", "5", "50", "7"]
    assert trained[-1] == "7"
    # The same runs, in one go.
    whole = sweep(tmp_path / "whole")
    assert [run.train_loss for run in whole.runs] == [run.train_loss for run in report.runs]


def scripted(losses: dict[float, float], tried: list[float]) -> Any:
    """A trial that takes no time: its loss by its factor, 1.0 for any other."""

    def trial(name: str, factor: float, *arguments: Any) -> Trial:
        tried.append(factor)
        return Trial(name, factor, factor, 0.5, losses.get(factor, 1.0), 1.0, 0.0)

    return trial


def chosen(report: IntrinsicReport, name: str, config: IntrinsicConfig) -> float:
    """The learning rate of a run, as a factor of where its search began."""
    found = report.run(name)
    assert found is not None
    start = {"full": config.lr, "probe": config.head_lr}
    return found.lr / (start[name] if name in start else config.subspace_lr(int(name), report.size))


@pytest.mark.parametrize(
    ("losses", "wanted", "best"),
    [
        ({1.0: 0.1}, [0.5, 1, 2], 1.0),  # between others: the end
        ({2.0: 0.5, 4.0: 0.4, 8.0: 0.3, 16.0: 0.6}, [0.5, 1, 2, 4, 8, 16], 8.0),  # until one is worse
        ({0.5: 0.5, 0.25: 0.4}, [0.5, 1, 2, 0.25, 0.125], 0.25),
        ({2.0**i: -float(i) for i in range(9)}, [0.5, 1, 2, 4, 8, 16], 16.0),  # BEYOND at most
        ({1.0: 0.9, 0.5: math.inf, 2.0: math.inf}, [0.5, 1, 2], 1.0),
    ],
)
def test_the_search_for_a_rate_ends_where_one_is_between_worse_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: dict[float, float], wanted: list[float], best: float
) -> None:
    assert BEYOND == 3
    tried: list[float] = []
    monkeypatch.setattr(module, "_try", scripted(losses, tried))
    config = replace(CONFIG, rates=(2.0, 0.5, 1.0))
    report = sweep(tmp_path / "out", config, dims=(5,))
    assert tried == wanted * 3  # full, probe, 5
    for name in ("full", "probe", "5"):
        assert chosen(report, name, config) == pytest.approx(best)
    kept = IntrinsicReport.read(tmp_path / "out" / "intrinsic.json")
    assert kept == report and "Infinity" not in (tmp_path / "out" / "intrinsic.json").read_text()


def test_a_rate_is_judged_by_training_texts_that_it_was_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    fit, judge = module._fit, module.accuracy

    def watched_fit(model: Any, data: Labelled, config: Any, lr: float, head_lr: float, epochs: float) -> Any:
        seen.append(("train", data.ids.tolist(), lr, epochs))
        return fit(model, data, config, lr, head_lr, epochs)

    def watched_judge(model: Any, data: Labelled, batch_size: int) -> Any:
        seen.append(("judge", data.ids.tolist()))
        return judge(model, data, batch_size)

    monkeypatch.setattr(module, "_fit", watched_fit)
    monkeypatch.setattr(module, "accuracy", watched_judge)
    config = replace(CONFIG, rates=(1.0, 2.0), tune_fraction=0.25, tune_epochs=0.5)
    monkeypatch.setattr(module, "BEYOND", 0)
    report = sweep(tmp_path / "out", config, dims=(5,))
    train, held_out = texts(48, 0).ids.tolist(), texts(30, 1).ids.tolist()
    names = [name for name in ("full", "probe", "5") for _ in range(6)]
    assert len(seen) == len(names)
    for number in range(0, len(seen), 6):
        trials, last = seen[number : number + 4], seen[number + 4 : number + 6]
        assert [step[1] for step in trials] == [train[: 36 * 6], train[36 * 6 :]] * 2
        assert [step[3] for step in trials[::2]] == [0.5, 0.5]
        assert (last[0][1], last[0][3], last[1][1]) == (train, 1, held_out)
        best = min(report.tried(names[number]), key=lambda trial: trial.loss)
        assert last[0][2] == best.lr  # to the bit
    assert len({trial.loss for trial in report.trials}) == len(report.trials)


def test_a_rate_that_diverges_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = module._fit

    def diverging(model: Any, data: Labelled, config: Any, lr: float, *others: Any) -> Any:
        if lr > 1.5 * config.lr and lr != config.head_lr:
            raise NonFiniteLossError(3, "loss", math.nan, lr)
        return fit(model, data, config, lr, *others)

    monkeypatch.setattr(module, "_fit", diverging)
    config = replace(CONFIG, rates=(1.0, 2.0))
    with pytest.raises(NonFiniteLossError):  # the probe: every rate is too high for it here, and that is told
        sweep(tmp_path / "out", config, dims=(5,))
    report = IntrinsicReport.read(tmp_path / "out" / "intrinsic.json")
    by_factor = {trial.factor: trial for trial in report.tried("full")}
    assert math.isfinite(by_factor[1.0].loss) and by_factor[2.0].loss == math.inf
    assert by_factor[2.0].accuracy == 0
    assert chosen(report, "full", config) <= 1.0


def test_a_search_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, rates=(0.5, 1.0, 2.0))
    whole = sweep(tmp_path / "whole", config, dims=(5,))
    tried: list[tuple[str, float]] = []
    real = module._try

    def watched(name: str, factor: float, *arguments: Any) -> Trial:
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append((name, factor))
        return real(name, factor, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_try", watched)
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path / "out", config, dims=(5,))
    kept = IntrinsicReport.read(tmp_path / "out" / "intrinsic.json")
    assert [(trial.name, trial.factor) for trial in kept.trials] == tried == [("full", 0.5), ("full", 1.0)]
    report = sweep(tmp_path / "out", config, dims=(5,))

    def figures(found: IntrinsicReport) -> list[tuple[str, float, float]]:
        return [(each.name, each.lr, each.loss) for each in (*found.trials, *found.runs)]

    assert report.complete and figures(report) == figures(whole)


def test_the_report_tells_how_to_repeat_it(tmp_path: Path) -> None:
    report = sweep(tmp_path / "out", about={"model_dir": "minilm"}, dims=(5,))
    content = json.loads((tmp_path / "out" / "intrinsic.json").read_text())
    assert content["about"]["model_dir"] == "minilm"
    assert content["about"].keys() >= {"nybble", "torch", "threads", "isa"}
    assert content["settings"].keys() >= {"seed", "rates", "tune_fraction", "pooling", "epochs", "dtype", "train"}
    other = TextClassifier(bert(pooler=False), 3, "cls")
    with pytest.raises(DestinationExistsError, match="a sweep whose pooling is 'mean'; give another directory"):
        intrinsic(other, texts(48, 0), texts(30, 1), tmp_path / "out", CONFIG, dims=(5,))
    with pytest.raises(DestinationExistsError, match="a sweep whose seed is 0; give another directory"):
        sweep(tmp_path / "out", replace(CONFIG, seed=1), dims=(5,))
    assert IntrinsicReport.read(tmp_path / "out" / "intrinsic.json") == report


def test_no_run_begins_after_the_time(tmp_path: Path) -> None:
    report = sweep(tmp_path / "out", seconds=0.0)
    assert not report.runs and not report.complete
    assert report.readings() == [] and not (tmp_path / "out").exists()


def test_the_head_can_be_trained_beside_the_subspace(tmp_path: Path) -> None:
    head = 64 * 3 + 3
    report = sweep(tmp_path / "out", replace(CONFIG, head="trained", structure=True))
    assert report.size == sum(p.numel() for p in classifier().parameters()) - head
    assert [run.trained for run in report.runs[2:]] == [5 + head, 50 + head]
    with pytest.raises(ValueError, match=r"dims must be integers above 3 and at most"):
        sweep(tmp_path / "other", IntrinsicConfig(head="trained", structure=True), dims=(3,))


def test_scales_have_a_learning_rate_of_their_own() -> None:
    config = replace(CONFIG, structure=True, scale_lr=0.02)
    for name, factor in (("50", 1.0), ("50", 9.0), ("500", 1.0)):
        model = classifier()
        _, lr, _ = module._prepare(name, factor, model, config, [])
        assert module._prepare(name, factor, classifier(), CONFIG, [])[1] == pytest.approx(lr)
        subspace = model.get_submodule("subspace")
        optimizer = torch.optim.Adam(subspace.parameters(), lr=lr)
        for parameter in subspace.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # Adam's first step is the learning rate
        z, scales = subspace.z, 1 + subspace.scale_step * (subspace.scales - 1)
        torch.testing.assert_close(z.detach(), torch.full_like(z, -lr))
        torch.testing.assert_close(scales.detach(), torch.full_like(scales, 0.98), atol=1e-5, rtol=0)


def test_what_the_output_does_not_depend_on_is_left_out(tmp_path: Path) -> None:
    report = intrinsic(classifier(pooler=True), texts(16, 0), texts(9, 1), tmp_path / "out", CONFIG, dims=(5,))
    assert report.unused == ["encoder.pooler.dense.weight", "encoder.pooler.dense.bias"]
    assert report.size == sum(p.numel() for p in classifier().parameters())
    assert report.run("full").trained == report.size  # type: ignore[union-attr]  # it is there


def run(name: str, dims: int | None, accuracy: float) -> Run:
    return Run(name, dims, 1, 0.1, accuracy, 1.0, 1.0, 1.0)


def test_readings_are_the_least_d_that_reaches_each_threshold(tmp_path: Path) -> None:
    report = IntrinsicReport(1000, 3, 10, 10, 0.2, {}, [run("full", None, 0.8), run("probe", 0, 0.5)])
    report.runs += [run("100", 100, 0.74), run("10", 10, 0.70), run("1000", 1000, 0.79), run("1", 1, 0.3)]
    of_full, over_majority, over_probe = report.readings()
    assert (of_full.threshold, of_full.d90, of_full.below) == (pytest.approx(0.72), 100, 10)
    # Full's accuracy counts with its factor of 0.9 in the threshold, the subspace's is at the threshold itself.
    assert of_full.error == pytest.approx((0.81 * 0.8 * 0.2 / 10 + 0.72 * 0.28 / 10) ** 0.5)
    assert of_full.crossing == pytest.approx(10**1.5)  # half way between 0.70 and 0.74
    assert (over_majority.threshold, over_majority.d90) == (pytest.approx(0.74), 100)
    assert (over_probe.threshold, over_probe.d90, over_probe.below) == (pytest.approx(0.77), 1000, 100)
    report.runs = [row for row in report.runs if row.name != "1000"]
    unreached = report.readings()[2]
    assert (unreached.d90, unreached.below, unreached.crossing) == (None, 100, None)
    plot_intrinsic(report.to_dict(), tmp_path / "x.svg")
    assert "not reached" in (tmp_path / "x.svg").read_text()
    report.runs = [run("full", None, 0.8), run("10", 10, 0.75)]
    (first, _) = report.readings()  # without a probe there are two
    assert (first.d90, first.below, first.crossing) == (10, None, 10.0)
    with pytest.raises(ValueError, match="no run in a subspace"):
        plot_intrinsic({"runs": []}, tmp_path / "y.svg")


def test_another_sweep_is_refused_by_name(tmp_path: Path) -> None:
    sweep(tmp_path / "out", dims=(5,))
    with pytest.raises(DestinationExistsError, match=r"holds a sweep whose step is 2\.0; give another directory"):
        sweep(tmp_path / "out", replace(CONFIG, step=3.0))
    other = classifier()
    with torch.no_grad():
        other.encoder.embeddings.word_embeddings.weight[5, 5] += 1
    with pytest.raises(DestinationExistsError, match="whose model is another one"):
        intrinsic(other, texts(48, 0), texts(30, 1), tmp_path / "out", CONFIG, dims=(5,))
    with pytest.raises(DestinationExistsError, match="whose train is another one"):
        intrinsic(classifier(), texts(48, 7), texts(30, 1), tmp_path / "out", CONFIG, dims=(5,))
    (tmp_path / "out" / "intrinsic.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is damaged .*; remove it to begin anew"):
        sweep(tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(DestinationExistsError, match="is not empty and holds no sweep"):
        sweep(tmp_path / "full")


def test_bad_input_is_named(tmp_path: Path) -> None:
    model, train = classifier(), texts(9, 0)
    for dims in ((), (0,), (10**9,), (2.5,)):
        with pytest.raises(ValueError, match="dims must be integers above 0 and at most"):
            intrinsic(model, train, texts(9, 1), tmp_path / "out", CONFIG, dims=dims)  # type: ignore[arg-type]
    odd = Labelled(train.ids, train.starts, train.labels, ("x", "y", "z"))
    with pytest.raises(ValueError, match="held_out: its classes are not those of train"):
        intrinsic(model, train, odd, tmp_path / "out", CONFIG)
    for options, text in (
        ({"head": "no"}, "head must be 'subspace' or 'trained', got 'no'"),
        ({"scale_lr": 0}, "scale_lr must be a number above 0, got 0"),
        ({"step": 0}, "step must be a number above 0, got 0"),
        ({"head_lr": float("nan")}, "head_lr must be a number above 0, got nan"),
        ({"epochs": -1}, "epochs must be a number above 0"),
        ({"rates": ()}, r"rates must be one or more numbers above 0, got \(\)"),
        ({"rates": (1.0, -2.0)}, r"rates must be one or more numbers above 0, got \(1.0, -2.0\)"),
        ({"tune_fraction": 1.0}, "tune_fraction must be a number above 0 and below 1, got 1.0"),
        ({"tune_epochs": 0}, "tune_epochs must be a number above 0 or None, got 0"),
        ({"dtype": "fp8"}, "dtype must be 'bf16' or 'fp32', got 'fp8'"),
    ):
        with pytest.raises(ValueError, match=text):
            IntrinsicConfig(**options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_rate_of_a_subspace_meets_full_fine_tunings() -> None:
    config = IntrinsicConfig(step=16.0, lr=1e-4)
    assert config.subspace_lr(100, 10**7) == pytest.approx(1.6)
    assert config.subspace_lr(10**6, 10**7) == pytest.approx(1e-3)
    assert config.subspace_lr(10**7, 10**7) == pytest.approx(1e-4)


def test_a_head_has_a_learning_rate_of_its_own() -> None:
    model = classifier()
    train_all(model)
    config = TrainConfig(head_lr_ratio=100.0, weight_decay=0.1)
    optimizer = make_optimizer(dict(model.named_parameters()), config)
    set_learning_rate(optimizer, 1e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(1e-2 if name.startswith("head.") else 1e-4)
    with pytest.raises(ValueError, match="head_lr_ratio must be a number above 0, got 0"):
        TrainConfig(head_lr_ratio=0)


def test_the_model_is_left_alone(tmp_path: Path) -> None:
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    intrinsic(model, texts(16, 0), texts(9, 1), tmp_path / "out", CONFIG, dims=(5,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "subspace")
