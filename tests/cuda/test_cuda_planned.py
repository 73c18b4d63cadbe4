"""What `nybble plan` counts for a GPU is what the kernels take there."""

from __future__ import annotations

from types import ModuleType

import torch

from nybble.planning import memory


def test_the_workspace(cuda: ModuleType) -> None:
    assert cuda.core().WORKSPACE_BYTES == memory.CUDA_WORKSPACE


def test_the_rows_from_which_a_weight_is_decoded_as_a_whole(cuda: ModuleType, capability: int) -> None:
    def kernels(m: int) -> list[str]:
        found = [
            cuda.explain_linear(4096, 4096, m, torch.bfloat16, False, transposed, device=torch.device("cpu"))
            for transposed in (False, True)
        ]
        return [row["kernel"] for row in found]

    # Where it is decoded later than planned, as on Hopper, less is taken.
    assert "dequantize" not in " ".join(kernels(memory.CUDA_DECODES_FROM - 1))
    forward, backward = kernels(memory.CUDA_DECODES_FROM)
    assert ("dequantize" in forward) == (capability < 90) and "dequantize" not in backward
