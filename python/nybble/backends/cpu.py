"""The CPU: addresses of torch tensors to the compiled core. Codecs as in `nybble.reference`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _core, reference  # after torch: the core shares its OpenMP runtime
from ..errors import LayoutError
from ..formats import NESTED_BLOCK_SIZE, dynamic_map
from . import codec
from .addresses import DTYPE_CODES, SEARCHES, address_of, linear_operands, new_output
from .weight import PackedWeight, decoded_columns, handle_of

#: Said wherever memory is made: a caller's torch.device context or default device must not decide.
_CPU = torch.device("cpu")


def quantize_4bit(
    x: Tensor,
    codebook: Tensor,
    block_size: int,
    search: str = "absmax",
    name: str = "x",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `nybble.reference.quantize_4bit`."""
    x, codebook, packed, absmax = codec.quantize_4bit_tensors(x, codebook, block_size, search, name, importance)
    try:
        _core.quantize_4bit(
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            x.numel(),
            block_size,
            codebook.data_ptr(),
            SEARCHES[search],
            address_of(importance),
            0 if importance is None else importance.numel(),
            packed.data_ptr(),
            absmax.data_ptr(),
            torch.get_num_threads(),
        )
    except _core.NonFiniteBlock:
        reference.check_finite(x, block_size, name)  # finds the element and says so
        raise
    return packed, absmax


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """See `nybble.reference.dequantize_4bit`."""
    weight = codec.flat_weight(packed, absmax, codebook, block_size, shape, dtype)
    return dequantize(weight, dtype).reshape(tuple(shape))


def dequantize(weight: PackedWeight, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The weight [out_features, in_features] in `dtype`, its scales decoded inside the kernel.

    Written to `out` if that is given (see `nybble.reference.check_out`), which is then returned.
    """
    out = codec.dequantized(weight, dtype, out)
    if weight.codebook is None:
        _core.dequantize_int8(
            weight.packed.data_ptr(),
            weight.absmax.data_ptr(),
            weight.out_features,
            weight.in_features,
            out.data_ptr(),
            DTYPE_CODES[dtype],
            torch.get_num_threads(),
        )
        return out
    _core.dequantize_4bit(
        weight.packed.data_ptr(),
        weight.absmax.data_ptr(),
        address_of(weight.nested_absmax),
        address_of(weight.nested_map),
        address_of(weight.nested_offset),
        weight.nested_block_size,
        weight.codebook.data_ptr(),
        weight.block_size,
        out.numel(),
        out.data_ptr(),
        DTYPE_CODES[dtype],
        torch.get_num_threads(),
    )
    return out


def nested_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `nybble.reference.nested_quantize`."""
    offset = reference.nested_offset(absmax)
    q, nested_absmax = quantize_8bit(absmax - offset, dynamic_map(), NESTED_BLOCK_SIZE, name="absmax")
    return q, nested_absmax, offset


def nested_dequantize(
    q: Tensor, nested_absmax: Tensor, nested_map: Tensor, offset: Tensor, nested_block_size: int = NESTED_BLOCK_SIZE
) -> Tensor:
    """See `nybble.reference.nested_dequantize`."""
    return dequantize_8bit(q, nested_absmax, nested_map, nested_block_size, torch.float32) + offset


def quantize_8bit(x: Tensor, code: Tensor, block_size: int, name: str = "x") -> tuple[Tensor, Tensor]:
    """See `nybble.reference.quantize_8bit`."""
    x, code, q, absmax = codec.quantize_8bit_tensors(x, code, block_size, name)
    try:
        _core.quantize_8bit(
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            x.numel(),
            block_size,
            code.data_ptr(),
            q.data_ptr(),
            absmax.data_ptr(),
            torch.get_num_threads(),
        )
    except _core.NonFiniteBlock:
        reference.check_finite(x, block_size, name)
        raise
    return q, absmax


def dequantize_8bit(q: Tensor, absmax: Tensor, code: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """See `nybble.reference.dequantize_8bit`."""
    q, absmax, code, out = codec.dequantize_8bit_tensors(q, absmax, code, block_size, dtype)
    _core.dequantize_8bit(
        q.data_ptr(),
        absmax.data_ptr(),
        code.data_ptr(),
        q.numel(),
        block_size,
        out.data_ptr(),
        DTYPE_CODES[dtype],
        torch.get_num_threads(),
    )
    return out


def quantize_int8(x: Tensor, name: str = "x") -> tuple[Tensor, Tensor]:
    """See `nybble.reference.quantize_int8`."""
    x, q, scb = codec.quantize_int8_tensors(x, name)
    rows, cols = x.shape
    try:
        _core.quantize_int8(
            x.data_ptr(), DTYPE_CODES[x.dtype], rows, cols, q.data_ptr(), scb.data_ptr(), torch.get_num_threads()
        )
    except _core.NonFiniteBlock:
        reference.quantize_int8(x, name)  # finds the element and says so
        raise
    return q, scb


def dequantize_int8(q: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """See `nybble.reference.dequantize_int8`."""
    return dequantize(codec.int8_weight(q, scb, dtype), dtype)


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, side: Tensor | None, side_weight: Tensor | None
) -> Tensor:
    """x W^T + side side_weight^T + bias in x's dtype, one pass over the output.

    Arguments have been checked (`nybble.ops.check_args`).

    Args:
        x: [..., in_features], fp32, fp16 or bf16. Where weight.compute is 1, each row is rounded to int8
            (`nybble.reference.linear_int8_activations`), but for columns that reach weight.outlier_threshold.
        bias: [out_features]. side: [..., R]. side_weight: [out_features, R].

    Returns:
        [..., out_features] in x's dtype. bf16 is multiplied as bf16 with fp32 accumulation where the ISA can,
        else, like fp16 and fp32, in fp32.
    """
    out = new_output(x, weight.out_features)
    if weight.outlier_threshold:
        x, side, side_weight = _outliers_aside(x, weight, side, side_weight)
    _run(x, weight, bias, side, side_weight, out, False)
    return out


def _outliers_aside(
    x: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x without its outlier columns, which become columns of the side path: that is never rounded to int8."""
    x = x.detach()
    outliers = reference.outlier_columns(x, weight.outlier_threshold)
    if outliers is None:
        return x, side, side_weight
    left, right = x[..., outliers], decoded_columns(weight, outliers)
    if side is not None and side_weight is not None:
        left, right = torch.cat([left, side.detach()], -1), torch.cat([right, side_weight.detach()], 1)
    return x.index_fill(-1, outliers, 0.0), left, right


def grad_input(g: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None) -> Tensor:
    """g W + side side_weight in g's dtype; g [..., out_features], side [..., R], side_weight [R, in_features]."""
    out = new_output(g, weight.in_features)
    _run(g, weight, None, side, side_weight, out, True)
    return out


def _run(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    side: Tensor | None,
    side_weight: Tensor | None,
    out: Tensor,
    grad_input: bool,
) -> None:
    _kept, operands = linear_operands(x, bias, side, side_weight)  # _kept: alive until the kernel has returned
    _core.linear(
        handle_of(weight, _core),
        grad_input,
        0 if grad_input else weight.compute,
        *operands,
        out.data_ptr(),
        torch.get_num_threads(),
    )


def round_feedback(
    target: Tensor,
    factor: Tensor,
    absmax: Tensor,
    codebook: Tensor | None,
    block_size: int,
    order: Tensor | None = None,
) -> Tensor:
    """See `nybble.reference.round_feedback`; computes in fp32."""
    codes = torch.empty(target.shape, dtype=torch.int8 if codebook is None else torch.uint8, device=_CPU)
    _round(_core.round_feedback, codes, target, factor, absmax, codebook, block_size, order, 1)
    return codes


def round_descent(
    codes: Tensor,
    target: Tensor,
    hessian: Tensor,
    absmax: Tensor,
    codebook: Tensor | None,
    block_size: int,
    order: Tensor | None = None,
    sweeps: int = 1,
) -> Tensor:
    """See `nybble.reference.round_descent`; computes in fp32."""
    kind = torch.int8 if codebook is None else torch.uint8
    if codes.dtype != kind or codes.shape != target.shape:
        raise LayoutError(
            f"codes are {codes.dtype} {tuple(codes.shape)}; they must be {kind} {tuple(target.shape)}, as the target"
        )
    codes = codes.clone(memory_format=torch.contiguous_format)
    _round(_core.round_descent, codes, target, hessian, absmax, codebook, block_size, order, sweeps)
    return codes


def _round(
    kernel: Callable[..., None],
    codes: Tensor,
    target: Tensor,
    matrix: Tensor,
    absmax: Tensor,
    codebook: Tensor | None,
    block_size: int,
    order: Tensor | None,
    sweeps: int,
) -> None:
    reference.check_rounding(target, matrix, absmax, codebook, block_size, order)
    kernel(
        target.data_ptr(),
        target.shape[0],
        target.shape[1],
        matrix.data_ptr(),
        address_of(order),
        absmax.data_ptr(),
        address_of(codebook),
        block_size if codebook is not None else 64,
        sweeps,
        codes.data_ptr(),
        torch.get_num_threads(),
    )


def explain_linear(
    out_features: int,
    in_features: int,
    m: int,
    dtype: torch.dtype,
    int8: bool,
    grad_input: bool,
    compute: int = 0,
    block_size: int = 64,
    device: torch.device | None = None,
) -> dict[str, str]:
    """Which kernel `linear` (or `grad_input`) would run, and why: kernel, isa, compute, reason."""
    compute = 0 if grad_input else compute
    return _core.explain_linear(out_features, in_features, m, DTYPE_CODES[dtype], int8, grad_input, compute, block_size)
