"""Metal kernels on the host: `nybble.backends.mps` on CPU tensors, its text compiled and run by the shim."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from shim.metal import library
from torch import Tensor

from nybble import backends
from nybble.backends import mps as backend

# The strategies and bounds of the CPU's kernels are theirs as well.
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

SEED = int(os.environ.get("NYBBLE_SHIM_SEED", "1"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The examples are small: torch's threads would mostly wait for each other. All of it is for Linux."""
    if sys.platform != "linux":
        pytest.skip("the shim needs Linux")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def schedule() -> library.Schedule:
    """In which order threads run, and whether small numbers are 0; see the shim."""
    found = library.schedule
    found.seed, found.order, found.flush = SEED, "random", False
    found.launches.clear()
    return found


@pytest.fixture
def mps(schedule: library.Schedule, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`nybble.backends.mps`, which now takes CPU tensors and runs the kernels in the shim."""
    monkeypatch.setattr(backend, "compile_shader", library.compile_shader)
    monkeypatch.setattr(backend, "_missing", lambda: "")
    for cached in (backend._library, backend._kernel):
        cached.cache_clear()
    yield backend
    for cached in (backend._library, backend._kernel):
        cached.cache_clear()


@pytest.fixture
def on_shim(mps: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The operations and layers of `nybble` on CPU tensors run the Metal kernels, in the shim."""
    of = backends.of

    def shimmed(tensor_or_device: Tensor | torch.device | str) -> ModuleType:
        found = of(tensor_or_device)
        return mps if found is backends.cpu else found

    monkeypatch.setattr(backends, "of", shimmed)
    return mps
