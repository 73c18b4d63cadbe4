"""What an adapter does to a weight, applied to rows of it: W + scaling * B A, and DoRA's norms on that."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .adapter import AdapterLayer, read_finite
from .slabs import Reader

# Rows that are multiplied at once, so that a row's bits do not depend on the piece that it is in.
ROWS = 64


class Update:
    """An adapter's change of a weight.

    Args:
        layer: the adapter's part for this weight.
        factor: 1 to merge, -1 to take away again.
    """

    def __init__(self, layer: AdapterLayer, factor: float = 1.0) -> None:
        a, b = layer.factors()
        if layer.kind == "embedding":
            a, b = b.T.contiguous(), a.T.contiguous()
        self._a, self._b = a, b * (layer.scaling * factor)
        self._magnitude = None if layer.magnitude is None else read_finite(layer.magnitude).reshape(-1)
        self._by_columns = layer.kind == "embedding"
        self._column_factors: Tensor | None = None

    @staticmethod
    def fixed(layer: AdapterLayer) -> int:
        """Bytes that it holds."""
        return 4 * (layer.lora_A.numel + layer.lora_B.numel) * 2

    @property
    def needs_columns(self) -> bool:
        """Whether `see` must be given all rows before `rows` is called: DoRA of an embedding scales its columns."""
        return self._magnitude is not None and self._by_columns and self._column_factors is None

    def see(self, squares: Tensor) -> None:
        """squares: fp64 [in], of the columns of `added`, summed over all rows."""
        assert self._magnitude is not None
        self._column_factors = (self._magnitude.double() / squares.sqrt().clamp_min(1e-300)).float()

    def added(self, weight: Tensor, first: int) -> Tensor:
        """weight: fp32 [rows, in], the rows from `first` on; returns their sum with the low-rank update, fp32."""
        return torch.addmm(weight, self._b[first : first + weight.shape[0]], self._a)

    def rows(self, weight: Tensor, first: int) -> Tensor:
        """weight: fp32 [rows, in], the rows from `first` on; returns the merged rows, fp32."""
        merged = self.added(weight, first)
        if self._magnitude is None:
            return merged
        if self._by_columns:
            assert self._column_factors is not None
            return merged.mul_(self._column_factors)
        norms = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
        magnitude = self._magnitude[first : first + weight.shape[0], None]
        return merged.mul_(magnitude / norms.clamp_min_(torch.finfo(torch.float32).tiny))


class MergedReader:
    """A weight with an update on it.

    Raises (in `read`):
        NonFiniteError: the sum is not finite; names the weight and its file.
    """

    def __init__(self, base: Reader, layer: AdapterLayer, factor: float = 1.0) -> None:
        self._base, self._update = base, Update(layer, factor)
        self.name, self.shape, self.dtype = base.name, base.shape, base.dtype
        self.fixed, self.bytes_per_element = base.fixed + Update.fixed(layer), base.bytes_per_element + 12
        self._difference = self._norm = 0.0
        self._counted = 0  # rows that are in the two sums; a sink may want to see them again

    def read(self, start: int, stop: int) -> Tensor:
        rows, width = self.shape
        if self._update.needs_columns:
            self._measure_columns()
        first = start // width // ROWS * ROWS
        last = min(rows, math.ceil(math.ceil(stop / width) / ROWS) * ROWS)
        weight = self._base.read(first * width, last * width).view(-1, width)
        merged = torch.empty(last - first, width, dtype=torch.float32)
        for row in range(first, last, ROWS):
            part = slice(row - first, min(row + ROWS, last) - first)
            exact = weight[part].float()
            merged[part] = self._update.rows(exact, row)
            if row >= self._counted:
                self._count(exact, merged[part], row)
        return merged.view(-1)[start - first * width : stop - first * width]

    def _count(self, exact: Tensor, merged: Tensor, row: int) -> None:
        norm = float(torch.linalg.vector_norm(merged))
        if not math.isfinite(norm):
            self._check(merged, row)
            norm = float(torch.linalg.vector_norm(merged, dtype=torch.float64))
        self._norm += norm**2
        self._difference += float(torch.linalg.vector_norm(exact - merged)) ** 2
        self._counted = row + merged.shape[0]

    def _check(self, merged: Tensor, row: int) -> None:
        bad = ~torch.isfinite(merged).reshape(-1)
        if bool(bad.any()):
            index = row * self.shape[1] + int(bad.to(torch.uint8).argmax())
            detail = f"the merged value at flat index {index}, row-major in {list(self.shape)}, is not finite"
            raise NonFiniteError(self.name, index, int(bad.sum()), detail)

    def _measure_columns(self) -> None:
        rows, width = self.shape
        squares = torch.zeros(width, dtype=torch.float64)
        for row in range(0, rows, ROWS):
            last = min(row + ROWS, rows)
            exact = self._base.read(row * width, last * width).view(-1, width).float()
            squares += self._update.added(exact, row).double().square_().sum(0)
        self._update.see(squares)

    @property
    def update(self) -> float:
        """||change|| / ||merged|| of what was read so far, each row once."""
        return (self._difference / self._norm) ** 0.5 if self._norm else 0.0

    @staticmethod
    def least(layer: AdapterLayer) -> int:
        """Bytes of the smallest piece beside those of the base's reader."""
        return 16 * ROWS * layer.shape[1]


class FiniteReader:
    """A tensor whose NaN and infinities are an error that names it and its file."""

    def __init__(self, base: Reader) -> None:
        self._base = base
        self.name, self.shape, self.dtype = base.name, base.shape, base.dtype
        self.fixed, self.bytes_per_element = base.fixed, base.bytes_per_element + 2

    def read(self, start: int, stop: int) -> Tensor:
        values = self._base.read(start, stop)
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            index = start + int((~finite).to(torch.uint8).argmax())
            detail = f"the value at flat index {index}, row-major in {list(self.shape)}, is not finite"
            raise NonFiniteError(self.name, index, int((~finite).sum()), detail)
        return values
