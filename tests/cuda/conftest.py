"""CUDA kernels on the host: `nybble.backends.cuda` on CPU tensors, its compiled core replaced by the shim's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from shim import build
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


@pytest.fixture
def cuda(
    _modules: tuple[ModuleType, ModuleType], shim: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """`nybble.backends.cuda`, which now takes CPU tensors and runs the kernels in the shim."""
    core, _ = _modules
    workspaces: dict[tuple[int, int], Tensor] = {}
    monkeypatch.setattr(backend, "core", lambda: core)
    monkeypatch.setattr(backend, "place", lambda device: (0, 0))
    monkeypatch.setattr(backend, "_workspaces", workspaces)
    monkeypatch.setattr(backend, "_missing", lambda index: "")
    monkeypatch.setattr(backend, "missing", lambda device: "")
    yield backend
    for workspace in workspaces.values():
        counters = workspace[: 4 * core.COUNTERS].view(torch.int32)
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
