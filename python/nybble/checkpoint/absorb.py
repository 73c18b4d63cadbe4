"""Rounding a merged weight to 4 bits so that the low-rank update survives.

An update is far smaller than a quantization step: 0.007 of the weight's norm on a real fine-tuning run, where rounding
to the nearest code moves a weight by 0.09 of its norm, and where the base is quantized already most codes stay what
they were. But the update acts only through the r directions that A's rows span. So the columns are rounded one after
another, and what rounding has done so far to a row's product with those directions is made up for by the columns that
follow: error feedback as in GPTQ (arXiv 2210.17323), with A in the place of calibration data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from ..errors import CheckpointError
from ..formats import QuantConfig
from .adapter import AdapterLayer, read_finite
from .slabs import CHUNK, QuantSink
from .writer import tensor_bytes

# Rows that are rounded at once, so that a row's codes do not depend on the piece that it is in.
ROWS = 512

# Columns of A that are held in fp64 at once.
_COLUMNS = 1024

# Of the mean squared length of a column's directions: columns that A hardly looks at need not pay for the others.
_DAMPING = 0.03


def feedback_codes(target: Tensor, scales: Tensor, codebook: Tensor, directions: Tensor) -> Tensor:
    """Codes of `target`, rounded column by column with feedback on `directions`.

    Args:
        target: fp32 [rows, columns]. scales: fp32 [rows, columns], the absmax of each element's block.
        codebook: fp32 [16], any order. directions: fp32 [r, columns], orthonormal rows.

    Returns:
        uint8 [rows, columns], indices into `codebook`.
    """
    rows, columns = target.shape
    sorted_codes, order = torch.sort(codebook)
    middles = (sorted_codes[1:] + sorted_codes[:-1]) / 2
    norms = directions.square().sum(0)
    norms = norms + _DAMPING * norms.mean().clamp_min(1e-30)
    by_column, scale_of = target.T.contiguous(), scales.T.contiguous()
    direction_of = directions.T.contiguous()
    debt = torch.zeros(rows, directions.shape[0])
    picked = torch.empty(columns, rows, dtype=torch.long)
    for column in range(columns):
        along, scale, exact = direction_of[column], scale_of[column], by_column[column]
        aim = exact - torch.mv(debt, along) / norms[column]
        index = torch.bucketize(aim / scale, middles)
        picked[column] = index
        debt.addr_(sorted_codes[index] * scale - exact, along)
    return order[picked].T.to(torch.uint8).contiguous()


def orthonormal(a: Tensor) -> Tensor:
    """Orthonormal rows [r', columns] that span the rows of `a` [r, columns], fp32, which is overwritten.

    From the eigenvectors of A A^T, some columns at a time: an SVD of A would hold several copies of it in fp64. What
    squaring the condition costs is made up for by a second pass, over rows that are nearly orthonormal already.
    """
    for _ in range(2):
        gram = torch.zeros(a.shape[0], a.shape[0], dtype=torch.float64)
        for part in a.split(_COLUMNS, dim=1):
            wide = part.double()
            gram.addmm_(wide, wide.T)
        squares, vectors = torch.linalg.eigh(gram)
        kept = squares > 1e-12 * squares.max() if squares.numel() else squares > 0
        turn = (vectors[:, kept] / squares[kept].sqrt()).T
        for part in a.split(_COLUMNS, dim=1):
            part[: turn.shape[0]] = turn @ part.double()
        a = a[: turn.shape[0]]
    return a


class AbsorbSink(QuantSink):
    """A `QuantSink` that takes the scales from a first pass and rounds by `feedback_codes` in a second."""

    again = True

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        config: QuantConfig,
        where: str,
        layer: AdapterLayer,
    ) -> None:
        super().__init__(name, shape, dtype, config, where)
        if not config.is_4bit:
            raise CheckpointError(f"{where}: absorb rounds to 4-bit formats, not to {config.format_name}")
        self._layer, self._columns = layer, shape[1]
        group = ROWS * shape[1]
        self.step = group * (config.block_size // math.gcd(group, config.block_size))
        self.bytes_per_element = 4 * 7 + 8
        self.again = True
        # The directions, once more by columns, and as read; A A^T with its eigenvectors and their room; the debts.
        self._factor = layer.lora_A if layer.kind == "linear" else layer.lora_B
        r = layer.r
        self.fixed += 3 * 4 * r * shape[1] + 7 * 8 * r * r + 2 * 8 * r * min(shape[1], _COLUMNS) + 4 * r * ROWS

    def put(self, start: int, values: Tensor) -> None:
        """The first pass: scales only."""
        config = self._config
        assert self._codes is not None
        backend = backends.of(values)
        _, scales = backend.quantize_4bit(values, self._codes, config.block_size, config.search, self._where)
        first = start // config.block_size
        self._absmax[first : first + scales.numel()] = scales

    def compare(self, start: int, values: Tensor) -> None:
        """The second pass: codes."""
        size = self._config.block_size
        assert self._codes is not None
        if start == 0:
            factor = read_finite(self._factor)
            self._directions = orthonormal(factor if self._layer.kind == "linear" else factor.T.contiguous())
        for at in range(0, values.numel(), ROWS * self._columns):
            target = values[at : at + ROWS * self._columns]
            begin = start + at
            first, last = begin // size, -(-(begin + target.numel()) // size)
            scales = self._absmax[first:last].repeat_interleave(size)[begin - first * size :][: target.numel()]
            rows, scales = target.view(-1, self._columns), scales.view(-1, self._columns)
            codes = feedback_codes(rows, scales, self._codes, self._directions)
            decoded = (self._codes[codes.long()] * scales).view(-1)
            for chunk in range(0, target.numel(), CHUNK):
                self._errors.add(target[chunk : chunk + CHUNK], decoded[chunk : chunk + CHUNK])
            flat = codes.reshape(-1)
            if flat.numel() % 2:  # only at the very end: other groups have an even number of rows
                zero = int((self._codes == 0).nonzero()[0]) if bool((self._codes == 0).any()) else 0
                flat = torch.cat([flat, flat.new_full((1,), zero)])
            self._out.append(self._name, tensor_bytes((flat[0::2] << 4) | flat[1::2]))
