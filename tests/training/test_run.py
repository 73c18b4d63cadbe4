"""What a run takes over from the state that it finds, what it refuses to do silently, what Ctrl-C leaves undone."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import TEXT, ByteTokenizer, llama

from nybble import LoRAConfig, TrainConfig, add_lora, finetune
from nybble.nn.adapters import set_adapter
from nybble.training import TextClassifier
from nybble.training.data import Labelled
from nybble.training.metrics import Display, MetricsFile
from nybble.training.prepare import prepare_labelled
from nybble.training.report import Evaluation, Recorder, TrainReport

transformers = pytest.importorskip("transformers")
TOKENS = torch.tensor(list(TEXT.encode()))
CONFIG = TrainConfig(steps=3, batch_size=2, seq_len=32, lr=1e-2, warmup_steps=0, dtype="fp32", plot=False)
TEXTS = [{"text": f"text {i}", "label": "abc"[i % 3]} for i in range(30)]


def adapted(dropout: float = 0.0) -> Any:
    model = llama()
    add_lora(model, LoRAConfig(r=4, alpha=8, dropout=dropout))
    return model


def run(model: Any, **changes: Any) -> Any:
    return finetune(model, TOKENS, dataclasses.replace(CONFIG, **changes), show=False)


def classifier() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=256,
        max_position_embeddings=32,
    )
    return TextClassifier(transformers.BertModel(config).eval(), 3)


def labelled(rows: list[Any] = TEXTS, names: Any = None) -> Labelled:
    return Labelled.read(rows, ByteTokenizer(), 32, names)


def test_neither_old_gradients_nor_the_state_of_the_generator_matter() -> None:
    expected = run(adapted(dropout=0.3)).losses
    model = adapted(dropout=0.3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.manual_seed(1234)
    assert run(model).losses == expected


@pytest.mark.parametrize("stop", [2, 3])
def test_an_evaluation_that_ctrl_c_forestalled_is_made_up_for(stop: int, tmp_path: Path) -> None:
    data = {"val_fraction": 0.2, "steps": 4, "eval_every": 2, "keep_best": True}

    def interrupt(step: int, loss: float) -> None:
        if step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    whole = run(adapted(), out_dir=tmp_path / "whole", **data)
    config = dataclasses.replace(CONFIG, out_dir=tmp_path / "out", **data)
    first = finetune(adapted(), TOKENS, config, show=False, on_step=interrupt)
    assert first.interrupted and len(first.losses) == stop
    report = finetune(adapted(), TOKENS, config, show=False)
    assert report.resumed_from == stop
    assert report.evaluations == whole.evaluations and report.best == whole.best
    assert [e.step for e in report.evaluations] == [0, 2, 4]


def test_a_held_out_loss_that_is_nan_is_not_the_best() -> None:
    recorder = Recorder(TrainReport(), MetricsFile(None), Display(4, 1, enabled=False), CONFIG)
    nan = float("nan")
    found = [recorder.evaluation(Evaluation(step, loss)) for step, loss in enumerate((nan, 3.0, nan, 2.0, 2.0))]
    assert found == [True, True, False, True, False]
    assert recorder.report.best == Evaluation(3, 2.0) and recorder.stale == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"early_stopping": 2}, "early_stopping=2 counts evaluations: give eval_every too"),
        ({"keep_best": True}, "keep_best needs out_dir"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_early_stopping_without_held_out_data_is_refused_without_out_dir_too() -> None:
    with pytest.raises(ValueError, match="need held-out data"):
        run(adapted(), early_stopping=1, eval_every=1)


def test_what_does_not_act_is_named() -> None:
    model = adapted()
    set_adapter(model, None)
    with pytest.raises(ValueError, match=r"its adapters are 'default'; choose one with nybble\.set_adapter"):
        run(model)
    set_adapter(model, ["default", None])
    with pytest.raises(ValueError, match="chosen row by row"):
        run(model)


def test_held_out_texts_are_as_many_as_asked_for_and_of_the_same_classes() -> None:
    config = dataclasses.replace(CONFIG, eval_windows=4)
    train, held_out = prepare_labelled(classifier(), labelled(), dataclasses.replace(config, val_fraction=0.5))
    assert held_out is not None and (len(train), len(held_out)) == (15, 4)
    _, held_out = prepare_labelled(classifier(), labelled(), config, eval_data=labelled(TEXTS[:3]))
    assert held_out is not None and len(held_out) == 3
    others = labelled([row for row in TEXTS if row["label"] != "a"])  # its class 0 is "b"
    with pytest.raises(ValueError, match=r"eval_data: its classes are 'b', 'c', those of data 'a', 'b', 'c'"):
        prepare_labelled(classifier(), labelled(), config, eval_data=others)


def test_texts_of_another_tokenizer_are_refused() -> None:
    data = dataclasses.replace(labelled(), ids=labelled().ids + 200)
    with pytest.raises(ValueError, match="the model's vocabulary has 256"):
        prepare_labelled(classifier(), data, CONFIG)


def test_another_base_that_is_trained_whole_is_told_when_a_run_goes_on(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, out_dir=tmp_path / "out", save_every=1)

    def call(seed: int, stop: int) -> tuple[Any, str]:
        def on_step(step: int, loss: float) -> None:
            if step == stop:
                raise ZeroDivisionError

        text = io.StringIO()
        console = Console(file=text, width=300)
        save = lambda model, directory: model.save_pretrained(directory)  # noqa: E731
        try:
            return finetune(
                llama(seed=seed), TOKENS, config, save=save, console=console, on_step=on_step
            ), text.getvalue()
        except ZeroDivisionError:
            return None, text.getvalue()

    what = "weights are not those that the run began with"
    assert what not in call(0, 2)[1]
    assert what not in call(0, 3)[1]
    report, said = call(1, 0)
    assert what in said and report.resumed_from == 2
