"""From what `finetune` is given to a task: data read, packed, checked against the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from .classifier import TextClassifier
from .config import TrainConfig
from .data import DataReport, Labelled, Rows, make_rows
from .distributed.world import ALONE, World
from .evaluate import check_length, check_vocabulary
from .tasks import CausalTask, ClassificationTask, MixedTask, Task


def make_task(
    model: nn.Module,
    data: Any,
    config: TrainConfig,
    tokenizer: Any = None,
    eval_data: Any = None,
    world: World = ALONE,
) -> tuple[Task, list[str]]:
    """(the task of this process, what to tell of the data).

    Raises ValueError for data, config or a model that do not fit together, and what reading the data raises.
    """
    check_length(model, config.seq_len, "seq_len")
    if eval_data is not None and config.val_fraction:
        raise ValueError(f"give eval_data or val_fraction, not both: got eval_data and {config.val_fraction}")
    if isinstance(model, TextClassifier):
        train, test = prepare_labelled(model, data, config, tokenizer, eval_data)
        return ClassificationTask(model, train, test, config, world), [
            f"{len(train):,} texts of {model.classes} classes"
        ]
    if not isinstance(data, Mapping):
        rows, held_out, report = prepare_rows(model, data, config, tokenizer, eval_data)
        return CausalTask(model, rows, held_out, config, world), [str(report)]
    if not data:
        raise ValueError("data is an empty mapping; give data for at least one adapter")
    held = eval_data if isinstance(eval_data, Mapping) else dict.fromkeys(data, eval_data)
    unknown = [name for name in held if name not in data]
    if unknown:
        raise ValueError(f"eval_data: adapter {unknown[0]!r} is not trained; data has {', '.join(map(repr, data))}")
    parts = {
        name: prepare_rows(model, part, config, tokenizer, held.get(name), f"data[{name!r}]")
        for name, part in data.items()
    }
    task = MixedTask(
        model, {name: p[0] for name, p in parts.items()}, {name: p[1] for name, p in parts.items()}, config, world
    )
    return task, [f"{name}: {p[2]}" for name, p in parts.items()]


def prepare_rows(
    model: nn.Module,
    data: Any,
    config: TrainConfig,
    tokenizer: Any = None,
    eval_data: Any = None,
    name: str = "data",
) -> tuple[Rows, Rows | None, DataReport]:
    """(training rows, held-out rows or None, what became of the data), checked against the model."""
    rows, held_out, report = make_rows(data, config.seq_len, config.packing, tokenizer, config.val_fraction, name)
    check_vocabulary(model, rows.ids, name)
    if eval_data is not None:
        held_out = make_rows(eval_data, config.seq_len, config.packing, tokenizer, 0.0, f"eval_{name}")[0]
        check_vocabulary(model, held_out.ids, f"eval_{name}")
    if held_out is not None and config.eval_windows is not None:
        held_out = held_out.part(0, config.eval_windows)
    return rows, held_out, report


def prepare_labelled(
    model: TextClassifier, data: Any, config: TrainConfig, tokenizer: Any = None, eval_data: Any = None
) -> tuple[Labelled, Labelled | None]:
    """(training texts, held-out texts or None): `Labelled` as it is, else read and cut to seq_len tokens."""

    def read(source: Any, names: Any, name: str) -> Labelled:
        if isinstance(source, Labelled):
            return dataclasses.replace(source, seed=config.seed)
        if tokenizer is None:
            raise ValueError(f"{name}: a tokenizer is needed for texts")
        return Labelled.read(source, tokenizer, config.seq_len, names, config.seed, name)

    train = read(data, None, "data")
    check_vocabulary(model, train.ids, "data")
    if len(train.names) > model.classes:
        raise ValueError(f"data has {len(train.names)} classes, the model {model.classes}")
    if eval_data is None:
        train, held_out = train.split(config.val_fraction)
    else:
        held_out = read(eval_data, train.names, "eval_data")
        if held_out.names != train.names[: len(held_out.names)]:
            raise ValueError(
                f"eval_data: its classes are {', '.join(map(repr, held_out.names[:20]))}, those of data "
                f"{', '.join(map(repr, train.names[:20]))}; read it with names=data.names"
            )
        check_vocabulary(model, held_out.ids, "eval_data")
    if held_out is not None and config.eval_windows is not None:
        held_out = held_out.part(0, min(config.eval_windows, len(held_out)))
    return train, held_out
