"""A codebook of a weight's own: 16 numbers of least weighted squared error, found by alternation (Lloyd 1982).

Such a weight is read by nybble alone, as one with a custom codebook; the bits per weight stay what they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..formats import codebook
from ..reference import MIN_ABSMAX

# Turns of scales and codes; a turn more changes the error by less than a thousandth (measured on SmolLM2's layers).
_TURNS = 4
_STEPS = 4  # of Lloyd's within a turn
# A code that no value is near to keeps this far from its neighbours, so that the codebook stays ascending.
_APART = 1e-4


def learn_codebook(weight: Tensor, importance: Tensor, block_size: int, start: Tensor | None = None) -> Tensor:
    """The codes (fp32 [16], ascending) for a weight whose columns count as `importance` says.

    Args:
        weight: fp32 [rows, cols]. importance: fp32 [cols], not negative.
        start: the codebook to begin with; NF4 if None.

    In turn, scales are chosen for the codes (least weighted squared error), and codes for the scales.
    """
    codes = codebook("nf4") if start is None else start.clone()
    flat = weight.reshape(-1)
    counts = importance.expand_as(weight).reshape(-1)
    backend = backends.of(weight)
    for _ in range(_TURNS):
        _, absmax = backend.quantize_4bit(weight, codes, block_size, "importance", importance=importance)
        scales = absmax.repeat_interleave(block_size)[: flat.numel()]
        values = flat / scales
        mass = counts * scales.square()
        # Blocks of zeros, whose scale is next to nothing, say nothing.
        mass = torch.where(scales > 2 * MIN_ABSMAX, mass / mass.amax().clamp_min(1e-30), 0.0)
        for _ in range(_STEPS):
            index = torch.bucketize(values, (codes[1:] + codes[:-1]) / 2)
            total = torch.zeros(16, dtype=torch.float64).index_add_(0, index, mass.double())
            sums = torch.zeros(16, dtype=torch.float64).index_add_(0, index, (mass * values).double())
            codes = torch.where(total > 0, sums / total.clamp_min(1e-300), codes.double()).float()
            codes = _ascending(codes)
    return codes


def _ascending(codes: Tensor) -> Tensor:
    """Sorted and apart."""
    ordered = codes.sort().values.tolist()
    for at in range(1, 16):
        ordered[at] = max(ordered[at], ordered[at - 1] + _APART)
    return torch.tensor(ordered, dtype=torch.float32)
