"""Small operands for the tests of the operators, of one weight in three formats."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble import QuantConfig

N, K, M, R = 6, 10, 4, 3
SCALING = 2.0
WEIGHTS = {
    "nested": QuantConfig(),
    "plain": QuantConfig(double_quant=False, block_size=32),
    "int8": QuantConfig(format="int8", double_quant=False),
}


def inputs(dtype: torch.dtype = torch.float32, rows: int = M) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = {
        "x": (rows, K),
        "g": (rows, N),
        "bias": (N,),
        "side": (rows, R),
        "side_weight": (N, R),
        "a": (R, K),
        "b": (N, R),
    }
    return {name: torch.randn(*shape).to(dtype) for name, shape in shapes.items()}


def differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in tensors)


def row_masks(*shape: int) -> Tensor:
    """Scalings by row and column, some of them 0; of the first row all."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(3)) * 2
    mask[mask < 0.7] = 0.0
    mask[0] = 0.0
    return mask
