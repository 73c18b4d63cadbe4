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

from ..checkpoint.writer import Staging, full_disk_names, sync_directory, tensor_bytes
from ..errors import CheckpointError, DestinationExistsError
from ..nn.adapters import adapted_modules
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
_START = "start"
_SAMPLE = 4096  # bytes of each frozen parameter that tell one model from another


class RunDirectory:
    """The files of one run.

    Attributes:
        path: the directory. found: the checkpoint from which the run goes on, None for a new run.
        damaged: what was wrong with checkpoints that were passed over.
        same_start: whether the trained weights were at the run's beginning what `start` says.
    """

    def __init__(self, path: Path, identity: dict[str, Any], start: str = "") -> None:
        """To be closed.

        Raises DestinationExistsError when the directory holds anything but this very run, unfinished and not under way
        in another process, or a run that has left nothing yet.
        """
        self.path = path
        self._lock: int | None = None
        self.found: state.Snapshot | None = None
        self.damaged: list[str] = []
        self.same_start = True
        if not path.exists():
            path.mkdir(parents=True)
        try:
            if path.is_dir():
                self._lock = _locked(path)
                self._clean()
            if not path.is_dir() or any(path.iterdir()):
                self._take_up(identity, start)
            if self.found is None:
                with Staging(path) as staging:
                    staging.write(RUN, (json.dumps({**identity, _START: start}, indent=2) + "\n").encode())
                    staging.commit()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Another process may use the directory from now on."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_up(self, identity: dict[str, Any], start: str) -> None:
        run = self.path / RUN
        if not self.path.is_dir() or not run.is_file():
            raise DestinationExistsError(
                f"out_dir {self.path} exists and is not empty; a new or empty directory is needed, or that of a run "
                "of the same configuration and data that was interrupted"
            )
        try:
            before = json.loads(run.read_bytes())
            began = before.pop(_START, start)
        except (ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{run}: is damaged; remove {self.path} to begin anew") from error
        differences = list(_differences(before, identity))
        left = (self.path / ADAPTER, self.path / BEST, *self.checkpoints.glob(f"*/{state.FACTS}"))
        if differences and not any(path.exists() for path in left):
            return  # it came to nothing, and is what one has after a mistake in the settings
        if differences:
            raise DestinationExistsError(
                f"out_dir {self.path} holds an unfinished run that is not this one: {'; '.join(differences[:4])}. "
                "Run it with the same settings to go on, or give another out_dir"
            )
        state.clean(self.path / CHECKPOINTS)
        found = state.load(self.path / CHECKPOINTS)
        self.found, self.damaged, self.same_start = found.snapshot, found.damaged, began == start

    def _clean(self) -> None:
        """Remove what a killed process was writing; put back what it was about to replace."""
        for name in (ADAPTER, BEST):
            old = self.path / f".{name}.old"
            if old.is_dir() and not (self.path / name).exists():
                os.replace(old, self.path / name)
        begun = [
            path
            for name in (RUN, METRICS, PLOT, ADAPTER, BEST)
            for ending in ("[0-9]*.tmp", "partial", "old")
            for path in self.path.glob(f".{name}.{ending}")
        ]
        for path in begun:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

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
        """Have `save` write into the directory `name`, an empty one, which is there whole or as it was before."""
        target, partial, old = (self.path / n for n in (name, f".{name}.partial", f".{name}.old"))
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        try:
            save(partial)
            # On the disk before the name is: the checkpoints that could make it again are removed soon.
            sync_tree(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
        sync_directory(self.path)
        shutil.rmtree(old, ignore_errors=True)
        return target

    def finish(self) -> None:
        """The results are written: what only a continuation needs goes."""
        (self.path / RUN).unlink(missing_ok=True)
        state.clear(self.checkpoints)


def _locked(path: Path) -> int | None:
    """A handle of the directory that locks it against other processes until it is closed; None without such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise DestinationExistsError(f"out_dir {path} is in use: another run is writing there") from error
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


def sync_tree(directory: Path) -> None:
    """Make all that is in a directory last."""
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(folder, name), "rb+") as file, full_disk_names(Path(file.name)):
                os.fsync(file.fileno())
        sync_directory(Path(folder))


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
            digest.update(_beginning(parameter))
    return digest.hexdigest()


def start_fingerprint(model: nn.Module, trained: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """SHA-256 of the beginning of what is trained of the model itself; an adapter's first values may be drawn anew.

    dtype: what it will be trained in, if it is to be cast.
    """
    adapters = {id(p) for module in adapted_modules(model).values() for p in module.adapters.parameters()}
    digest = hashlib.sha256()
    for parameter in trained.values():
        if id(parameter) not in adapters:
            digest.update(_beginning(parameter, dtype))
    return digest.hexdigest()


def _beginning(tensor: Tensor, dtype: torch.dtype | None = None) -> memoryview:
    flat = tensor.detach().reshape(-1)
    dtype = dtype or flat.dtype
    return tensor_bytes(flat[: _SAMPLE // max(1, dtype.itemsize)].to(dtype))


def environment() -> dict[str, Any]:
    """What else decides the bits of a result: a continuation elsewhere is right, but not the same to the bit."""
    from .. import __version__
    from ..introspection import active_isa

    return {"nybble": __version__, "torch": torch.__version__, "threads": torch.get_num_threads(), "isa": active_isa()}
