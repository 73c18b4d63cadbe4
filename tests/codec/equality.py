"""Bit-for-bit comparison: torch.equal takes -0.0 for 0.0."""

from __future__ import annotations

import torch
from torch import Tensor

_AS_INTEGER = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers of the same width (integers as they are)."""
    return tensor.contiguous().view(_AS_INTEGER.get(tensor.dtype, tensor.dtype))


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Fails unless dtype, shape and every bit agree."""
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    same = bits(actual) == bits(expected)
    if not bool(same.all()):
        at = (~same).reshape(-1).nonzero().reshape(-1)[:5].tolist()
        got, want = actual.reshape(-1)[at].tolist(), expected.reshape(-1)[at].tolist()
        raise AssertionError(f"{what}: {int((~same).sum())} of {same.numel()} differ; at {at}: {got}, expected {want}")
