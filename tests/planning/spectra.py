"""Matrices of known singular values."""

from __future__ import annotations

import torch


def with_spectrum(values: list[float], rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """fp64 [rows, columns] with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    left = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64)).Q
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T
