"""out_dir: what a run leaves there, and when a run that is there is gone on with.

While a run is under way, `run.json` says which one it is and `checkpoints/` holds where it is. Both are removed when
the results are written: adapter/, metrics.jsonl, loss.png, best/.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.writer import Staging, tensor_bytes
from ..errors import CheckpointError, DestinationExistsError
from . import state

RUN, CHECKPOINTS, METRICS, PLOT, ADAPTER, BEST, BOARD = (
    "run.json",
    "checkpoints",
    "metrics.jsonl",
    "loss.png",
    "adapter",
    "best",
    "tensorboard",
)
_SAMPLE = 4096  # bytes of each frozen parameter that tell one model from another


class RunDirectory:
    """The files of one run.

    Attributes:
        path: the directory. found: the checkpoint from which the run goes on, None for a new run.
        damaged: what was wrong with checkpoints that were passed over.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Raises DestinationExistsError when the directory holds anything but this very run, unfinished."""
        self.path = path
        self.found: state.Snapshot | None = None
        self.damaged: list[str] = []
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            self._take_up(identity)
        else:
            path.mkdir(parents=True, exist_ok=True)
        if self.found is None:
            with Staging(path) as staging:
                staging.write(RUN, (json.dumps(identity, indent=2) + "\n").encode())
                staging.commit()

    def _take_up(self, identity: dict[str, Any]) -> None:
        run = self.path / RUN
        if not self.path.is_dir() or not run.is_file():
            raise DestinationExistsError(
                f"out_dir {self.path} exists and is not empty; a new or empty directory is needed, or that of a run "
                "of the same configuration and data that was interrupted"
            )
        try:
            before = json.loads(run.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{run}: is damaged; remove {self.path} to begin anew") from error
        differences = list(_differences(before, identity))
        if differences:
            raise DestinationExistsError(
                f"out_dir {self.path} holds an unfinished run that is not this one: {'; '.join(differences[:4])}. "
                "Run it with the same settings to go on, or give another out_dir"
            )
        state.clean(self.path / CHECKPOINTS)
        found = state.load(self.path / CHECKPOINTS)
        self.found, self.damaged = found.snapshot, found.damaged

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def plot(self) -> Path:
        return self.path / PLOT

    @property
    def board(self) -> Path:
        return self.path / BOARD

    def write(self, name: str, save: Callable[[Path], None]) -> Path:
        """Have `save` write the directory `name`, which is there whole or as it was before."""
        target, partial, old = (self.path / n for n in (name, f".{name}.partial", f".{name}.old"))
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        save(partial)
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old, ignore_errors=True)
        return target

    def finish(self) -> None:
        """The results are written: what only a continuation needs goes."""
        (self.path / RUN).unlink(missing_ok=True)
        state.clear(self.checkpoints)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> Iterable[str]:
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{at}{name}.")
        elif old != new:
            yield f"{at}{name} is {_short(new)}, there {_short(old)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def fingerprint(tensors: Iterable[Tensor | None]) -> str:
    """SHA-256 of tensors, whole."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"-" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}".encode())
        if tensor is not None:
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def model_fingerprint(model: nn.Module, trained: Mapping[str, Tensor]) -> str:
    """SHA-256 of the beginning of every parameter that is not trained: another base is another run."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{parameter.dtype}{list(parameter.shape)}".encode())
        if name not in trained:
            flat = parameter.detach().reshape(-1)
            digest.update(tensor_bytes(flat[: _SAMPLE // max(1, flat.element_size())]))
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """What else decides the bits of a result: a continuation elsewhere is right, but not the same to the bit."""
    from .. import __version__
    from ..introspection import active_isa

    return {"nybble": __version__, "torch": torch.__version__, "threads": torch.get_num_threads(), "isa": active_isa()}
