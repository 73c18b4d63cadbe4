"""Checkpoints of a run: everything that the next step depends on, written whole or not at all, verified when read.

A checkpoint is a directory `step-00000100` with two files: `state.safetensors`, the tensors, and `state.json`, which is
written last and holds the other's SHA-256 and its own. What a killed process left without a `state.json`, or damaged,
is not a checkpoint; the one before it counts then.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint.files import DTYPE_NAMES
from ..checkpoint.writer import ShardWriter, Slot, Staging, tensor_bytes
from ..errors import CheckpointError

TENSORS, FACTS = "state.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_PIECE = 1 << 24


class Whole(Protocol):
    """A tensor that is brought together when it is needed."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def whole(self) -> Tensor:
        """The tensor."""


@dataclass
class Snapshot:
    """What a run needs to go on after `step`.

    Attributes:
        step: optimizer steps done.
        tensors: name -> tensor: parameters ("parameter.NAME"), running means ("mean.NAME"), the optimizer's state
            ("optimizer.KEY.NAME"), losses.
        facts: JSON-able: losses, evaluations, the optimizer's numbers.
    """

    step: int
    tensors: Mapping[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def owner(name: str) -> str | None:
    """The parameter that a snapshot's tensor belongs to; None: to none."""
    kind, _, rest = name.partition(".")
    if kind == "optimizer":
        return rest.partition(".")[2]
    return rest if kind in ("parameter", "mean") else None


def save(directory: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write a checkpoint into `directory`, then remove all but the last `keep`, and those of later steps.

    The snapshot's tensors may be `Whole`s; they are then brought together one at a time.

    Raises:
        StorageFullError: the disk is full; the checkpoints before are untouched.
    """
    target = directory / f"step-{snapshot.step:08d}"
    if target.exists():
        _remove(target)
    slots = [Slot(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in snapshot.tensors.items()]
    with Staging(target) as staging:
        writer = ShardWriter(staging, TENSORS, slots, {"format": "pt"})
        for slot in slots:
            tensor: Any = snapshot.tensors[slot.name]
            tensor = tensor if isinstance(tensor, Tensor) else tensor.whole()
            writer.write(slot.name, slot.dtype, slot.shape or (), [tensor_bytes(tensor)])
        writer.finish()
        # The file has a temporary name until it is committed; what is hashed is what the disk will give back.
        digest = _sha256(staging.path(TENSORS))
        facts = {"step": snapshot.step, **snapshot.facts, "tensors_sha256": digest}
        staging.write(FACTS, json.dumps({**facts, "sha256": _own_sha256(facts)}).encode())
        staging.commit()
    found = _candidates(directory)
    # One of a later step is damaged, else the run would have gone on from it: it is none that counts.
    later = [path for step, path in found if step > snapshot.step]
    for old in later + [path for _, path in found[len(later) :][keep:]]:
        _remove(old)
    return target


def _remove(path: Path) -> None:
    # The mark first: half a removal is no checkpoint.
    (path / FACTS).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, None if there is none, and what was wrong with newer ones."""

    snapshot: Snapshot | None
    damaged: list[str]


def load(directory: Path) -> Found:
    """Read the newest checkpoint in `directory` that is whole."""
    damaged: list[str] = []
    for step, path in _candidates(directory):
        try:
            return Found(_read(path, step), damaged)
        except CheckpointError as error:
            damaged.append(str(error))
    return Found(None, damaged)


def newest(directory: Path) -> list[Path]:
    """Those that have their mark, the newest first."""
    return [path for _, path in _candidates(directory) if (path / FACTS).is_file()]


def keep_newest(directory: Path) -> int:
    """Remove all checkpoints but the newest; returns how many were removed."""
    old = newest(directory)[1:]
    for path in old:
        _remove(path)
    return len(old)


def clear(directory: Path) -> None:
    """Remove all checkpoints, and what a killed process left of them."""
    for _, path in _candidates(directory):
        _remove(path)
    shutil.rmtree(directory, ignore_errors=True)


def clean(directory: Path) -> None:
    """Remove what a killed process left: directories without a mark, temporary files."""
    for _, path in _candidates(directory):
        if not (path / FACTS).is_file():
            shutil.rmtree(path, ignore_errors=True)
        else:
            for file in path.glob(".*.tmp"):
                file.unlink(missing_ok=True)


def _candidates(directory: Path) -> list[tuple[int, Path]]:
    """(step, directory), the newest first."""
    if not directory.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def _read(path: Path, step: int) -> Snapshot:
    file, mark = path / TENSORS, path / FACTS
    try:
        facts = json.loads(mark.read_bytes())
        own = facts.pop("sha256")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: was not written to its end ({FACTS} is missing)") from error
    except OSError as error:  # a disk that does not give back what it took
        raise CheckpointError(f"{mark}: cannot be read ({error})") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{mark}: is damaged (not the JSON that was written)") from error
    if own != _own_sha256(facts) or facts.get("step") != step:
        raise CheckpointError(f"{mark}: is damaged (its checksum is not the one that was written)")
    try:
        if _sha256(file) != facts.pop("tensors_sha256"):
            raise CheckpointError(f"{file}: is damaged (its checksum is not the one that was written)")
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    return Snapshot(step, tensors, {name: value for name, value in facts.items() if name != "step"})


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _own_sha256(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# ---- an optimizer as tensors and numbers ---------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> tuple[dict[str, Tensor], Any]:
    """(tensors, JSON-able numbers) of an optimizer; `names` gives the name of each parameter by its id."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, values in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor], numbers: Any
) -> None:
    """Give an optimizer that has not stepped yet the state that `optimizer_state` told of another."""
    paths = {name: key for key, name in names.items()}
    by_name = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, dict[str, Any]] = {name: dict(values) for name, values in numbers.items()}
    for full, tensor in tensors.items():
        if full.startswith("optimizer."):
            _, key, name = full.split(".", 2)
            if name not in paths:
                raise CheckpointError(f"state of the optimizer for {name!r}, which is not trained")
            found.setdefault(name, {})[key] = tensor
    for name, values in found.items():
        parameter = by_name[name]
        optimizer.state[parameter] = {
            # A step counter stays where it was written; a moment lies beside its parameter.
            key: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
            for key, value in values.items()
        }


def copy_into(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Copy tensors `prefix.name` into parameters by name.

    Raises:
        CheckpointError: one is missing or has another shape or dtype.
    """
    for name, parameter in parameters.items():
        value = tensors.get(f"{prefix}.{name}")
        if value is None or value.shape != parameter.shape or value.dtype != parameter.dtype:
            came = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
            raise CheckpointError(f"{prefix}.{name}: {parameter.dtype} {list(parameter.shape)} is needed, got {came}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"{prefix}.{name}"])
