"""The executable specification: every codec and every contraction of nybble in plain torch, on any device.

Compiled backends have the same signatures, and tests hold them to these functions: bit for bit for the codecs with
`search="absmax"`, within the error bound of their summation order for the contractions and for `search="mse"`.
Nothing here is written for speed.

Tensors are taken flattened in row-major order whatever their strides; blocks run over that order, so a block may
straddle rows and the last one may be partial. Arithmetic is fp32 without fused multiply-adds, in the order written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import LayoutError, NonFiniteError
from .formats import NESTED_BLOCK_SIZE, check_block_size, dynamic_map
from .reference_checks import (
    check_8bit,
    check_codebook,
    check_finite,
    check_float,
    check_int8,
    check_out,
    check_output_dtype,
    check_packed,
    check_search,
)
from .reference_rounding import check_rounding, round_descent, round_feedback

__all__ = [
    "MIN_ABSMAX",
    "MSE_FACTORS",
    "block_absmax",
    "check_8bit",
    "check_codebook",
    "check_finite",
    "check_float",
    "check_int8",
    "check_out",
    "check_output_dtype",
    "check_packed",
    "check_rounding",
    "check_search",
    "dequantize_4bit",
    "dequantize_8bit",
    "dequantize_int8",
    "grad_input",
    "linear",
    "linear_int8_activations",
    "mse_scales",
    "nested_dequantize",
    "nested_offset",
    "nested_quantize",
    "outlier_columns",
    "pick_codes",
    "quantize_4bit",
    "quantize_8bit",
    "quantize_int8",
    "round_descent",
    "round_feedback",
    "to_blocks",
]

#: The smallest scale that is stored: keeps 1/absmax finite in fp32, so an all-zero block needs no special case.
MIN_ABSMAX = 1e-38

#: Up to here torch sums a contiguous fp32 tensor serially, so its mean is the same for every number of threads.
_SERIAL_MEAN = 32768

#: Factors of absmax that `search="mse"` tries, in this order (the first of equals wins).
MSE_FACTORS: tuple[float, ...] = tuple(0.5 + i / 64 for i in range(32, -1, -1))


def quantize_4bit(
    x: Tensor,
    codebook: Tensor,
    block_size: int,
    search: str = "absmax",
    name: str = "x",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantizes to 4 bits in blocks.

    The rule: absmax = max(max|x| over the block, 1e-38); s = clamp(x * (1 / absmax), -1, 1);
    rank = #{j: s > (c_j + c_{j+1}) / 2} over the codebook c in stable ascending order; the code is the rank's place in
    the codebook. Two codes make a byte, the even element in the high nibble; an odd tail is filled with the code of 0.

    Args:
        x: values, any shape and strides, fp32, fp16 or bf16.
        codebook: fp32 [16].
        block_size: one of `formats.BLOCK_SIZES`.
        search: "absmax", or the scale of least squared error among those that `mse_scales` considers, where every
            error counts alike ("mse"), by the square of the value itself ("square"), or by `importance`.
        name: what error messages call `x`.
        importance: for search="importance": fp32 [columns], contiguous, not negative; that of element i of the
            flattened `x` is importance[i % columns].

    Returns:
        packed uint8 [ceil(n / 2), 1] and absmax fp32 [ceil(n / block_size)] for n = x.numel().

    Raises:
        NonFiniteError: `x` holds NaN or Inf.
        UnsupportedDtypeError, FormatError: a dtype, block size or search that is not allowed.
    """
    check_float(x, name)
    check_block_size(block_size)
    check_codebook(codebook, 16, x.device)
    check_search(search, importance, x)
    check_finite(x, block_size, name)
    n = x.numel()
    blocks = to_blocks(x, block_size)
    absmax = block_absmax(blocks)
    if search == "mse":
        absmax = mse_scales(blocks, absmax, codebook, n)
    elif search == "square":
        absmax = mse_scales(blocks, absmax, codebook, n, (blocks.double() / absmax[:, None]).square())
    elif importance is not None:
        weights = importance.double()[torch.arange(blocks.numel()) % importance.numel()]
        absmax = mse_scales(blocks, absmax, codebook, n, weights.reshape(blocks.shape))
    codes = pick_codes(blocks, absmax, codebook).reshape(-1)
    # Padding to whole blocks put zeros after the last element, so an odd tail's pad nibble is already the code of 0.
    codes = codes[: n + n % 2]
    return ((codes[0::2] << 4) | codes[1::2]).unsqueeze(1), absmax


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The values codebook[code] * absmax[block], computed in fp32 and cast to `dtype`.

    Args:
        packed: uint8 with ceil(n / 2) elements, n = prod(shape).
        absmax: fp32 [ceil(n / block_size)].
        codebook: fp32 [16].
        shape: shape of the result.
        dtype: fp32, fp16 or bf16.
    """
    check_block_size(block_size)
    check_codebook(codebook, 16, packed.device)
    check_output_dtype(dtype)
    n = math.prod(shape)
    check_packed(packed, absmax, block_size, n)
    flat = packed.reshape(-1)
    codes = torch.stack((flat >> 4, flat & 15), dim=1).reshape(-1)[:n]
    scales = absmax.repeat_interleave(block_size)[:n]
    return (codebook[codes.long()] * scales).to(dtype).reshape(tuple(shape))


def nested_offset(absmax: Tensor) -> Tensor:
    """The mean that double quantization subtracts from the scales (fp32, 0-dim; 0 for no scales).

    torch's own fp32 mean as long as torch sums serially: that is what bitsandbytes stores. Above, torch's result
    depends on the number of threads, so the float64 mean is rounded instead; also where the fp32 sum overflows.
    """
    if absmax.numel() == 0:
        return absmax.new_zeros(())
    if absmax.numel() <= _SERIAL_MEAN:
        mean = absmax.contiguous().mean()
        if bool(torch.isfinite(mean)):
            return mean
    return absmax.double().mean().float()


def nested_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: the scales minus their mean, in 8 bits with the signed dynamic map over blocks of 256.

    Args:
        absmax: fp32 [nb], finite.

    Returns:
        q uint8 [nb], nested_absmax fp32 [ceil(nb / 256)], offset fp32 0-dim (see `nested_offset`).
    """
    offset = nested_offset(absmax)
    code = dynamic_map().to(absmax.device)
    q, nested_absmax = quantize_8bit(absmax - offset, code, NESTED_BLOCK_SIZE, name="absmax")
    return q, nested_absmax, offset


def nested_dequantize(
    q: Tensor, nested_absmax: Tensor, nested_map: Tensor, offset: Tensor, nested_block_size: int = NESTED_BLOCK_SIZE
) -> Tensor:
    """The scales nested_map[q] * nested_absmax[block] + offset, fp32 [nb]: a product, then a sum, both rounded."""
    return dequantize_8bit(q, nested_absmax, nested_map, nested_block_size, torch.float32) + offset


def quantize_8bit(x: Tensor, code: Tensor, block_size: int, name: str = "x") -> tuple[Tensor, Tensor]:
    """Quantizes to 8 bits in blocks with a 256-entry map: the nearest entry by fp32 midpoints, ties to the lower.

    Args:
        x: values, any shape and strides, fp32, fp16 or bf16.
        code: fp32 [256], ascending. With an entry 0.0 (the dynamic maps have one) exact zeros stay exact zeros.
        block_size: one of `formats.BLOCK_SIZES`.

    Returns:
        q uint8 of x's shape, absmax fp32 [ceil(n / block_size)].

    Raises:
        NonFiniteError, UnsupportedDtypeError, FormatError: as `quantize_4bit`.
    """
    check_float(x, name)
    check_block_size(block_size)
    check_codebook(code, 256, x.device)
    check_finite(x, block_size, name)
    blocks = to_blocks(x, block_size)
    absmax = block_absmax(blocks)
    return pick_codes(blocks, absmax, code).reshape(-1)[: x.numel()].reshape(x.shape), absmax


def dequantize_8bit(q: Tensor, absmax: Tensor, code: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """The values code[q] * absmax[block], computed in fp32 and cast to `dtype`; q's shape."""
    check_block_size(block_size)
    check_codebook(code, 256, q.device)
    check_8bit(q, absmax, block_size)
    check_output_dtype(dtype)
    n = q.numel()
    scales = absmax.repeat_interleave(block_size)[:n]
    return (code[q.reshape(-1).long()] * scales).to(dtype).reshape(q.shape)


def quantize_int8(x: Tensor, name: str = "x") -> tuple[Tensor, Tensor]:
    """Row-wise int8 as LLM.int8 (arXiv 2208.07339) stores weights: cast to fp16, q = round(w * (1 / scb * 127)).

    Rounding is half to even. The factor is a reciprocal and a product, each rounded: so torch divides a number by a
    tensor, and with it bitsandbytes.

    Args:
        x: weight [N, K], fp32, fp16 or bf16.

    Returns:
        q int8 [N, K] in -127..127, scb fp32 [N], the largest magnitude of each row in fp16. A row of zeros has
        scb 0 and q 0.

    Raises:
        NonFiniteError: `x` holds NaN, Inf, or a magnitude above fp16's 65504.
        LayoutError: `x` is not 2-D.
    """
    check_float(x, name)
    if x.dim() != 2:
        raise LayoutError(f"{name} has shape {tuple(x.shape)}; int8 quantization takes a matrix [N, K]")
    columns = max(1, x.shape[1])
    check_finite(x, columns, name, unit="row")
    half = x.half()
    if not bool(torch.isfinite(half).all()):
        index = int((~torch.isfinite(half)).reshape(-1).to(torch.uint8).argmax())
        count = int((~torch.isfinite(half)).sum())
        value = x.reshape(-1)[index].item()
        raise NonFiniteError(
            name,
            index,
            count,
            f"{count} values exceed fp16, which the int8 layout casts weights to (65504 at most); the first is "
            f"{value} at flat index {index}, row {index // columns}",
        )
    w = half.float()
    scb = w.abs().amax(dim=1) if x.shape[1] else w.new_zeros(x.shape[0])
    factor = torch.where(scb > 0, scb.reciprocal() * 127.0, 0.0)
    return torch.round(w * factor.unsqueeze(1)).clamp(-127, 127).to(torch.int8), scb


def dequantize_int8(q: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """The values q * scb / 127 (fp32 product, fp32 quotient), cast to `dtype`; [N, K]."""
    check_int8(q, scb)
    check_output_dtype(dtype)
    return (q.float() * scb.unsqueeze(1) / 127.0).to(dtype)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, side: Tensor | None = None, side_weight: Tensor | None = None
) -> Tensor:
    """y = x W^T + side side_weight^T + bias, accumulated in fp32, rounded once to x's dtype.

    Args:
        x: [..., K].
        weight: [N, K], already dequantized.
        bias: [N].
        side: [..., R], the scaled product of x with LoRA's A; goes together with `side_weight`.
        side_weight: [N, R], LoRA's B.

    Returns:
        [..., N] in x's dtype.
    """
    y = x.float() @ weight.float().t()
    if side is not None and side_weight is not None:
        y = y + side.float() @ side_weight.float().t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def linear_int8_activations(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    side: Tensor | None = None,
    side_weight: Tensor | None = None,
    outlier_threshold: float | None = None,
) -> Tensor:
    """`linear` with each row of x rounded to int8 first: what `compute="int8"` means.

    Per row: scale = max|x| / 127 in fp32, q = round-half-even(x / scale) clamped to -127 .. 127 (0 where scale is 0),
    y = scale * (q W^T) + side side_weight^T + bias. An activation is off by at most scale / 2, its row's absmax / 254,
    besides fp32's rounding. A row with a NaN or an infinity gives NaN. The side path is not rounded.

    With an outlier threshold (LLM.int8, arXiv 2208.07339) a column of x in which the magnitude of any row reaches it is
    an outlier: it counts as 0 in the above, for scale and q alike, and its product with W's column, unrounded, is
    added. So a NaN or an infinity in an outlier column reaches only what it is multiplied to.

    Arguments and result as for `linear`. A kernel whose weight is int8 too sums q times the weight's integers exactly
    and scales the sum.
    """
    values = x.float()
    outliers = outlier_columns(x, outlier_threshold)
    exact = None
    if outliers is not None:
        exact = values[..., outliers] @ weight.float()[:, outliers].t()
        values = values.index_fill(-1, outliers, 0.0)
    scale = values.abs().amax(-1, keepdim=True) / 127.0 if x.shape[-1] else values.new_zeros(*x.shape[:-1], 1)
    q = torch.where(scale == 0, 0.0, torch.round(values / scale).clamp(-127.0, 127.0))
    y = scale * (q @ weight.float().t())
    if exact is not None:
        y = y + exact
    if side is not None and side_weight is not None:
        y = y + side.float() @ side_weight.float().t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def outlier_columns(x: Tensor, threshold: float | None) -> Tensor | None:
    """The columns of x [..., K] in which any magnitude reaches the threshold, int64 ascending; None where none does."""
    if not threshold or not x.numel():
        return None
    found = (x.reshape(-1, x.shape[-1]).float().abs() >= threshold).any(0).nonzero().reshape(-1)
    return found if found.numel() else None


def grad_input(g: Tensor, weight: Tensor, side: Tensor | None = None, side_weight: Tensor | None = None) -> Tensor:
    """dx = g W + side side_weight, accumulated in fp32, rounded once to g's dtype.

    Args:
        g: [..., N].
        weight: [N, K], already dequantized.
        side: [..., R], the scaled product of g with LoRA's B; goes together with `side_weight`.
        side_weight: [R, K], LoRA's A.

    Returns:
        [..., K] in g's dtype.
    """
    dx = g.float() @ weight.float()
    if side is not None and side_weight is not None:
        dx = dx + side.float() @ side_weight.float()
    return dx.to(g.dtype)


def to_blocks(x: Tensor, block_size: int) -> Tensor:
    """`x` flattened, as fp32 [blocks, block_size]; a partial last block is filled with zeros."""
    flat = x.reshape(-1).float()
    padding = -flat.numel() % block_size
    return torch.nn.functional.pad(flat, (0, padding)).reshape(-1, block_size)


def block_absmax(blocks: Tensor) -> Tensor:
    """The largest magnitude of each row of `blocks`, at least 1e-38; fp32."""
    return blocks.abs().amax(dim=1).clamp(min=MIN_ABSMAX)


def pick_codes(blocks: Tensor, scales: Tensor, codebook: Tensor) -> Tensor:
    """The code (uint8) of every element of `blocks` [nb, block_size] for given scales fp32 [nb]: the rule."""
    order = torch.argsort(codebook, stable=True)
    ascending = codebook[order]
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    s = (blocks * (1.0 / scales).unsqueeze(1)).clamp(-1, 1)
    return order.to(torch.uint8)[torch.bucketize(s, midpoints)]


def mse_scales(blocks: Tensor, absmax: Tensor, codebook: Tensor, n: int, weights: Tensor | None = None) -> Tensor:
    """Per block, the scale of least squared error among 33 sets of codes; fp32 [nb]. Only n elements are real.

    With `weights` (float64, as `blocks`) every product below is weighed by them.

    Each factor f of `MSE_FACTORS` gives codes c by the rule with the scale f * absmax, for which the best scale is
    <x, c> / <c, c>, leaving the error <x, x> - <x, c>^2 / <c, c>. The best f wins (the first of equals). A block for
    which no f gives a positive scale keeps its absmax. Picking the codes once more with the scale found can only
    lower the error, so it never exceeds that of absmax.
    """
    x = blocks.double()
    # A codebook without 0 gives the padding of a partial block codes that are not 0; they must not count.
    real = (torch.arange(blocks.numel(), device=blocks.device) < n).reshape(blocks.shape).double()
    counts = real if weights is None else real * weights
    best_gain = torch.zeros_like(absmax, dtype=torch.float64)
    best_scale = absmax.clone()
    for factor in MSE_FACTORS:
        codes = pick_codes(blocks, (absmax * factor).clamp(min=MIN_ABSMAX), codebook)
        c = codebook[codes.long()].double()
        xc, cc = (x * c * counts).sum(dim=1), (c * c * counts).sum(dim=1)
        scale = (xc / cc).float()
        gain = xc * xc / cc
        # A comparison with NaN (cc = 0) is false, so such a candidate never wins.
        better = (gain > best_gain) & (xc > 0) & (scale >= MIN_ABSMAX) & torch.isfinite(scale)
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale
