"""Tests that need an NVIDIA GPU and nybble's kernels for it (`needed` says where there are none).

The kernels' logic is tested on every machine by tests/cuda, which runs them on the host. Here is what only hardware
tells: its tensor cores, streams, graphs, memory, torch's compiler on top.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from nybble.backends import cuda


@pytest.fixture(autouse=True)
def gpu() -> Iterator[torch.device]:
    """The current GPU; products that a test compares with keep fp32 in full."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_tf32 = matmul.allow_bf16_reduced_precision_reduction = False
    previous = cuda.core().force_kernel(os.environ.get("NYBBLE_FORCE_CUDA_KERNEL", ""))
    yield torch.device("cuda", torch.cuda.current_device())
    cuda.core().force_kernel(previous)
    torch.cuda.synchronize()  # an error of this test's kernels is this test's
    matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of the versions of torch and transformers that a GPU machine happens to have are no failure here."""
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.filterwarnings("default"))
