"""One weight, rounded so that the layer's outputs change least: what a little data buys.

The measure is tr((W - Q) H (W - Q)^T) over tr(W H W^T), with H the second moments of the inputs: the squared error
of the outputs on the calibration data over their squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..errors import CalibrationError
from ..formats import NESTED_BLOCK_SIZE, NF4, QuantConfig, dynamic_map
from ..reference import MIN_ABSMAX
from ..tensor import QuantTensor
from .codebook import learn_codebook
from .settings import Rounding

# Rows whose scales are fitted at once: their systems of equations take rows * (columns / block)^2 * 4 bytes.
_FIT_BYTES = 64 << 20
# Inputs and weights below this, squared, are nothing.
_NOTHING = 1e-30
# A fitted scale may not leave what its first estimate allows: beyond, the system is ill-conditioned.
_FIT_RANGE = (0.5, 1.5)


@dataclass(frozen=True)
class Rounded:
    """A quantized weight, and the relative RMS error of the layer's outputs: by the plain rule, and as it is now.

    Both are None where no sample reached the layer.
    """

    tensor: QuantTensor
    error_plain: float | None = None
    error: float | None = None


class Moments:
    """H in the forms that rounding needs, for all weights that share an input.

    Attributes:
        hessian: H over the mean of its diagonal, damped; fp32 [K, K]. order: of its columns for rounding; None: as they
            are. importance: its diagonal, fp32 [K].
    """

    def __init__(self, moments: Tensor, settings: Rounding, name: str = "moments") -> None:
        """`moments`: fp32 [K, K], symmetric, the mean of x x^T over the inputs x; taken over.

        Raises:
            CalibrationError: it holds NaN or infinity, or stays singular with the damping; says `name`.
        """
        self.settings = settings
        diagonal = moments.diagonal()
        if not bool(torch.isfinite(diagonal).all()):
            raise CalibrationError(f"{name}: the inputs of this layer hold NaN or infinity on the calibration data")
        mean = float(diagonal.mean())
        self._dead = not mean > _NOTHING
        # A layer whose inputs are all zero says nothing of its weight: every error counts alike.
        self.hessian = torch.eye(moments.shape[0]) if self._dead else moments.div_(mean)
        diagonal = self.hessian.diagonal().add_(settings.damping)
        self.importance = diagonal.contiguous()
        self.order = torch.argsort(diagonal, descending=True, stable=True).int() if settings.act_order else None
        ordered = None if self.order is None else self.order.long()
        self.permuted = self.hessian if ordered is None else self.hessian[ordered][:, ordered].contiguous()
        self.factor = self._factor(name)

    def _factor(self, name: str) -> Tensor:
        for dtype in (torch.float32, torch.float64):
            lower, failed = torch.linalg.cholesky_ex(self.permuted.to(dtype))
            if not int(failed):
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not int(failed):
                    return upper.float().contiguous()
        raise CalibrationError(f"{name}: its second moments are singular; use more text or a larger damping")

    def damped_error(self, weight: Tensor, quantized: Tensor) -> float:
        """What rounding makes small, over the weight's own: tr(E H E^T) / tr(W H W^T), E = W - Q."""
        unit = _unit(weight)
        return self._energy((weight - quantized) / unit) / max(self._energy(weight / unit), _NOTHING)

    def output_error(self, weight: Tensor, quantized: Tensor) -> float:
        """The relative RMS error of the layer's outputs on the calibration data; without the damping."""
        if self._dead:
            return 0.0
        unit = _unit(weight)
        energies = []
        for each in ((weight - quantized) / unit, weight / unit):
            damping = self.settings.damping * float(each.square().sum(dtype=torch.float64))
            energies.append(max(0.0, self._energy(each) - damping))
        return math.sqrt(energies[0] / energies[1]) if energies[1] else 0.0

    def _energy(self, rows: Tensor) -> float:
        return float(((rows @ self.hessian) * rows).sum(dtype=torch.float64))


def _unit(weight: Tensor) -> float:
    """What brings a weight into a range in which fp32 holds its squares."""
    return max(float(weight.abs().max()) if weight.numel() else 0.0, MIN_ABSMAX)


def round_weight(weight: Tensor, moments: Moments, config: QuantConfig, dtype: torch.dtype, name: str) -> Rounded:
    """Quantize `weight` (fp32 [N, K]) to `config`'s format by the moments of the inputs.

    Args:
        config: any 4-bit format, "learned" among them, or int8; its `search` is not looked at.
        dtype: what the weight is stored as being of.

    Raises:
        NonFiniteError: the weight holds NaN or infinity; names `name`.
    """
    weight = weight.contiguous()
    plain = QuantTensor.quantize(weight, plain_rule(config), name)  # checks the values, too
    if config.is_learned:
        codes = learn_codebook(weight, moments.importance, config.block_size)
        config = replace(config, format=tuple(codes.tolist()))
    rounder = _Int8(weight) if config.codebook is None else _FourBit(weight, moments, config, name)
    best = rounder.round(moments)
    exact, decoded = plain.dequantize(torch.float32), best.dequantize(torch.float32)
    if moments.damped_error(weight, decoded) > moments.damped_error(weight, exact):
        best, decoded = plain, exact  # never seen but for weights at the ends of fp32's range
    best.dtype = dtype
    return Rounded(best, moments.output_error(weight, exact), moments.output_error(weight, decoded))


def plain_rule(config: QuantConfig) -> QuantConfig:
    """For where nothing is known of a layer's inputs: absmax scales, nearest codes; NF4's where others are learned."""
    codes: Any = NF4 if config.is_learned else config.format
    return replace(config, format=codes, search="absmax")


class _Int8:
    """Rows of int8 keep the scale of the plain rule, which covers them; only the codes are picked anew."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def round(self, moments: Moments) -> QuantTensor:
        backend, settings = backends.of(self._weight), moments.settings
        # As the plain rule: through fp16, whose rounding belongs to the layout's definition of the scale.
        _, absmax = backend.quantize_int8(self._weight)
        usable = absmax.clamp_min(MIN_ABSMAX)  # rows of zeros have the scale 0
        codes = backend.round_feedback(self._weight, moments.factor, usable, None, 0, moments.order)
        if settings.sweeps:
            codes = backend.round_descent(
                codes, self._weight, moments.permuted, usable, None, 0, moments.order, settings.sweeps
            )
        return QuantTensor(codes, absmax, None, 0, tuple(self._weight.shape), torch.float32, "int8")


class _FourBit:
    def __init__(self, weight: Tensor, moments: Moments, config: QuantConfig, name: str) -> None:
        codebook = config.codebook
        assert codebook is not None
        self._weight, self._config, self._codebook = weight, config, codebook
        self._backend = backends.of(weight)
        _, self._absmax = self._backend.quantize_4bit(
            weight, codebook, config.block_size, "importance", name, moments.importance
        )

    def round(self, moments: Moments) -> QuantTensor:
        settings = moments.settings
        best: QuantTensor | None = None
        least = math.inf
        absmax = self._absmax
        for turn in range(settings.refits + 1):
            scales = self._scales(absmax)
            decoded = scales.absmax_float()
            codes = self._codes(decoded, moments)
            tensor = self._packed(scales, codes)
            error = moments.damped_error(self._weight, tensor.dequantize(torch.float32))
            if best is None or error < least:
                least, best = error, tensor
            if self._weight.shape[1] % self._config.block_size:
                break  # scales of blocks that straddle rows are not fitted
            if turn < settings.refits:
                absmax = fit_scales(
                    self._weight, self._codebook, codes, decoded, moments.hessian, self._config.block_size
                )
        assert best is not None
        return best

    def _scales(self, absmax: Tensor) -> QuantTensor:
        """A weight without codes yet, whose scales are those that will be stored."""
        config = self._config
        result = QuantTensor(
            torch.empty(0, dtype=torch.uint8), absmax, self._codebook, config.block_size, tuple(self._weight.shape),
            torch.float32, config.format_name,
        )  # fmt: skip
        if config.double_quant:
            result.absmax, result.nested_absmax, result.nested_offset = self._backend.nested_quantize(absmax)
            result.nested_map = dynamic_map()
            result.nested_block_size = NESTED_BLOCK_SIZE
        return result

    def _codes(self, decoded: Tensor, moments: Moments) -> Tensor:
        # A nested scale may come out as 0, or below it where a block is far smaller than others. What is below is as
        # good as any: the codes are picked for it as it is.
        usable = torch.where(decoded.abs() < MIN_ABSMAX, MIN_ABSMAX, decoded)
        size, settings = self._config.block_size, moments.settings
        codes = self._backend.round_feedback(self._weight, moments.factor, usable, self._codebook, size, moments.order)
        if settings.sweeps:
            codes = self._backend.round_descent(
                codes, self._weight, moments.permuted, usable, self._codebook, size, moments.order, settings.sweeps
            )
        return codes

    def _packed(self, scales: QuantTensor, codes: Tensor) -> QuantTensor:
        flat = codes.reshape(-1)
        if flat.numel() % 2:
            zero = int(self._codebook.abs().argmin())
            flat = torch.cat([flat, flat.new_full((1,), zero)])
        scales.packed = ((flat[0::2] << 4) | flat[1::2]).unsqueeze(1)
        return scales


def fit_scales(
    weight: Tensor, codebook: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor, block_size: int
) -> Tensor:
    """The scales of least squared output error for given codes; fp32 [blocks].

    A row's blocks are coupled by H, so each row is a system of as many equations as it has blocks. Where a block
    straddles two rows there are no such systems.
    """
    rows, columns = weight.shape
    assert columns % block_size == 0
    count = columns // block_size
    result = torch.empty(rows, count)
    step = max(1, _FIT_BYTES // (4 * count * count + 12 * columns))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        shapes = codebook[codes[part].long()]
        now = scales.view(rows, count)[part]
        system = torch.empty(shapes.shape[0], count, count)
        for block in range(count):
            span = slice(block * block_size, (block + 1) * block_size)
            product = shapes[:, span] @ hessian[span]
            system[:, block] = product.mul_(shapes).view(-1, count, block_size).sum(2)
        wanted = ((weight[part] @ hessian) * shapes).view(-1, count, block_size).sum(2)
        ridge = 1e-3 * system.diagonal(dim1=1, dim2=2) + 1e-30
        system.diagonal(dim1=1, dim2=2).add_(ridge)
        fitted, failed = torch.linalg.solve_ex(system, wanted + ridge * now)
        low, high = _FIT_RANGE
        ratio = fitted / now
        good = (failed == 0)[:, None] & (ratio > low) & (ratio < high)
        result[part] = torch.where(good, fitted, now)
    return result.view(-1)
