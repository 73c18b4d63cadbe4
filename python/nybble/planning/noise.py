"""What of a difference of two checkpoints is rounding: its energy, and the largest singular value that it can have."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: dtype -> (bits after the leading one, exponent of the smallest normal number).
_FORMATS = {torch.bfloat16: (7, -126), torch.float16: (10, -14), torch.float32: (23, -126)}
#: The 99.9% quantile of the Tracy-Widom distribution for real matrices.
_TRACY_WIDOM = 3.27


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of the numbers of `dtype` that are next to each other at `values`; fp64, like `values`.

    >>> spacing(torch.tensor([1.0, 1.99, -2.0, 0.0], dtype=torch.float64), torch.bfloat16).log2().tolist()
    [-7.0, -7.0, -6.0, -133.0]
    """
    bits, least = _FORMATS[dtype]
    exponents = (torch.frexp(values).exponent - 1).clamp_min(least)
    exponents = torch.where(values == 0, least, exponents)
    return torch.exp2((exponents - bits).double())


class RoundingNoise:
    """Rounding in D = tuned - base, summed up while a matrix is read by rows.

    An element that is rounded to a grid of spacing u is off by an error of mean 0 and variance u^2 / 12. The tuned
    weights were rounded once, to the dtype that they are stored in. Where the base's value is none of that dtype's,
    training may have begun at a rounded one, and the variance counts twice. Rows that are the same in both have none.

    Errors differ in size with the weights that they are of, so the edge of Marchenko and Pastur (1967), sigma
    (sqrt(rows) + sqrt(columns)) for one sigma, would be too low. `edge` takes the root of the largest sum of variances
    of a row and that of a column in its place: for independent elements of any variances the largest singular value is
    about that at most (Bandeira and van Handel, Annals of Probability 44, 2016). On top come the fluctuations of
    finite matrices (Johnstone, Annals of Statistics 29, 2001).

    Attributes:
        known: whether the dtype says how elements were rounded; not so for quantized weights.
        energy: the expected ||E||_F^2 of the errors E.
    """

    def __init__(self, dtype: torch.dtype | None, columns: int) -> None:
        self.known = dtype in _FORMATS
        self._dtype = dtype
        self._columns = torch.zeros(columns, dtype=torch.float64)
        self._largest_row, self._rows = 0.0, 0

    def add(self, base: Tensor, part: Tensor) -> None:
        """Rows of the base and of D, fp64 [rows, columns] each."""
        if self._dtype is None or not self.known:
            return
        moved = (part != 0).any(dim=1)
        if not bool(moved.all()):
            base, part = base[moved], part[moved]
        if not len(part):
            return
        variance = spacing(base + part, self._dtype).square_().div_(12)
        variance = torch.where(base.to(self._dtype).double() == base, variance, 2 * variance)
        self._columns += variance.sum(0)
        self._largest_row = max(self._largest_row, float(variance.sum(1).max()))
        self._rows += len(part)

    @property
    def energy(self) -> float:
        return float(self._columns.sum())

    @property
    def edge(self) -> float:
        """A singular value of D above it is more than rounding; 0 where nothing was rounded."""
        if not self._rows:
            return 0.0
        m, n = math.sqrt(self._rows), math.sqrt(len(self._columns))
        fluctuation = _TRACY_WIDOM * (1 / m + 1 / n) ** (1 / 3) / (m + n)
        edge = math.sqrt(self._largest_row) + math.sqrt(float(self._columns.max()))
        return edge * math.sqrt(1 + fluctuation)
