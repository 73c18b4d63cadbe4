"""CUDA kernels on the host: `nybble.backends.cuda` on CPU tensors, its compiled core replaced by the shim's."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from shim import build
from shim.guarded import guarded_empty
from torch import Tensor

from nybble import backends
from nybble.backends import cuda as backend

# The strategies and bounds of the CPU's kernels are theirs as well.
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

SEED = int(os.environ.get("NYBBLE_SHIM_SEED", "0"))
CAPABILITIES = [80, 90]


@pytest.fixture(scope="session")
def _modules() -> tuple[ModuleType, ModuleType]:
    if sys.platform != "linux":
        pytest.skip("the shim needs Linux")
    return build.load()


@pytest.fixture
def shim(_modules: tuple[ModuleType, ModuleType]) -> Iterator[ModuleType]:
    """What controls the shim: seed(n), schedule("random" | "in order" | "reverse"), device(capability)."""
    core, control = _modules
    control.seed(SEED)
    control.schedule("random")
    control.device(90)
    core.force_kernel("")
    yield control
    core.force_kernel("")
    control.schedule("random")


@pytest.fixture(params=CAPABILITIES, ids=lambda capability: f"sm_{capability}")
def capability(request: pytest.FixtureRequest, shim: ModuleType) -> int:
    """Runs the test once for each kind of GPU that there are kernels for."""
    shim.device(request.param)
    return int(request.param)


class GuardedTorch:
    """torch, but what the backend allocates is full of NaN and ends at a page that must not be touched."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*shape: Any, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return guarded_empty(sizes, dtype, name="an output")


@functools.cache
def guarded_workspace(size: int) -> Tensor:
    return guarded_empty((size,), torch.uint8, alignment=256, name="the workspace")


@pytest.fixture
def cuda(
    _modules: tuple[ModuleType, ModuleType], shim: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """`nybble.backends.cuda`, which now takes CPU tensors and runs the kernels in the shim.

    Its outputs are guarded (see `GuardedTorch`), and so is the workspace, whose counters are looked at after the test.
    """
    core, _ = _modules
    memory = guarded_workspace(core.WORKSPACE_BYTES)
    counters = memory[: 4 * core.COUNTERS].zero_()
    used = memory[4 * core.COUNTERS :][: 1 << 20]

    def workspace(device: torch.device, index: int, stream: int) -> Tensor:
        used.fill_(0xFF)  # what an earlier kernel left there must not matter
        return memory

    monkeypatch.setattr(backend, "core", lambda: core)
    monkeypatch.setattr(backend, "place", lambda device: (0, 0))
    monkeypatch.setattr(backend, "workspace", workspace)
    monkeypatch.setattr(backend, "missing", lambda device: "")
    monkeypatch.setattr(backend, "torch", GuardedTorch())
    monkeypatch.setattr(
        backend,
        "new_output",
        lambda x, columns: guarded_empty((*x.shape[:-1], columns), x.dtype, name="the output"),
    )
    yield backend
    assert not counters.any(), "a kernel has left counters of the workspace that are not 0"


@pytest.fixture
def on_shim(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The operations and layers of `nybble` on CPU tensors run the CUDA kernels, in the shim."""
    of = backends.of

    def shimmed(tensor_or_device: Tensor | torch.device | str) -> ModuleType:
        found = of(tensor_or_device)
        return cuda if found is backends.cpu else found

    monkeypatch.setattr(backends, "of", shimmed)
    return cuda
