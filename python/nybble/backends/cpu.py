"""The CPU: addresses of torch tensors to the compiled core. Codecs as in `nybble.reference`, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _core, reference  # after torch: the core shares its OpenMP runtime
from ..errors import FormatError, LayoutError
from ..formats import NESTED_BLOCK_SIZE, check_block_size, dynamic_map
from .weight import PackedWeight

#: The core's codes of the dtypes that it computes with.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SEARCHES = {"absmax": 0, "mse": 1}
#: Said wherever memory is made: a caller's torch.device context or default device must not decide.
_CPU = torch.device("cpu")


def _values(x: Tensor) -> Tensor:
    """`x` as its address says: contiguous, and with a lazy negation carried out."""
    return x.detach().resolve_neg().contiguous()


def _rows(x: Tensor) -> Tensor:
    """[..., k] as [m, k] with the last dimension contiguous; a view where the strides permit."""
    x = x.detach().resolve_neg()
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() != 2 else x
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def quantize_4bit(
    x: Tensor, codebook: Tensor, block_size: int, search: str = "absmax", name: str = "x"
) -> tuple[Tensor, Tensor]:
    """See `nybble.reference.quantize_4bit`."""
    reference.check_float(x, name)
    check_block_size(block_size)
    reference.check_codebook(codebook, 16, x.device)
    if search not in _SEARCHES:
        raise FormatError(f"search is {search!r}; allowed are {', '.join(_SEARCHES)}")
    x, codebook = _values(x), codebook.contiguous()
    n = x.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=_CPU)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=_CPU)
    try:
        _core.quantize_4bit(
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            n,
            block_size,
            codebook.data_ptr(),
            _SEARCHES[search],
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
    check_block_size(block_size)
    reference.check_codebook(codebook, 16, packed.device)
    reference.check_output_dtype(dtype)
    n = math.prod(shape)
    reference.check_packed(packed, absmax, block_size, n)
    weight = PackedWeight(
        packed.contiguous(), absmax.contiguous(), codebook.contiguous(), None, None, None, 1, n, block_size, 1
    )
    return dequantize(weight, dtype).reshape(tuple(shape))


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [out_features, in_features] in `dtype`, its scales decoded inside the kernel."""
    weight.check()
    reference.check_output_dtype(dtype)
    out = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=_CPU)
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
        _address(weight.nested_absmax),
        _address(weight.nested_map),
        _address(weight.nested_offset),
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
    reference.check_float(x, name)
    check_block_size(block_size)
    reference.check_codebook(code, 256, x.device)
    x, code = _values(x), code.contiguous()
    q = torch.empty(x.shape, dtype=torch.uint8, device=_CPU)
    absmax = torch.empty(-(-x.numel() // block_size), dtype=torch.float32, device=_CPU)
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
    check_block_size(block_size)
    reference.check_codebook(code, 256, q.device)
    reference.check_8bit(q, absmax, block_size)
    reference.check_output_dtype(dtype)
    q, absmax, code = q.contiguous(), absmax.contiguous(), code.contiguous()
    out = torch.empty(q.shape, dtype=dtype, device=_CPU)
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
    reference.check_float(x, name)
    if x.dim() != 2:
        raise LayoutError(f"{name} has shape {tuple(x.shape)}; int8 quantization takes a matrix [N, K]")
    x = _values(x)
    rows, cols = x.shape
    q = torch.empty(rows, cols, dtype=torch.int8, device=_CPU)
    scb = torch.empty(rows, dtype=torch.float32, device=_CPU)
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
    reference.check_int8(q, scb)
    reference.check_output_dtype(dtype)
    return dequantize(
        PackedWeight(q.contiguous(), scb.contiguous(), None, None, None, None, q.shape[0], q.shape[1], 0, 1), dtype
    )


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, side: Tensor | None, side_weight: Tensor | None
) -> Tensor:
    """x W^T + side side_weight^T + bias in x's dtype, one pass over the output.

    Arguments have been checked (`nybble.ops.check_args`).

    Args:
        x: [..., in_features], fp32, fp16 or bf16. Where weight.compute is 1, each row is rounded to int8
            (`nybble.reference.linear_int8_activations`).
        bias: [out_features]. side: [..., R]. side_weight: [out_features, R].

    Returns:
        [..., out_features] in x's dtype. bf16 is multiplied as bf16 with fp32 accumulation where the ISA can,
        else, like fp16 and fp32, in fp32.
    """
    out = torch.empty(*x.shape[:-1], weight.out_features, dtype=x.dtype, device=_CPU)
    _run(x, weight, bias, side, side_weight, out, False)
    return out


def grad_input(g: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None) -> Tensor:
    """g W + side side_weight in g's dtype; g [..., out_features], side [..., R], side_weight [R, in_features]."""
    out = torch.empty(*g.shape[:-1], weight.in_features, dtype=g.dtype, device=_CPU)
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
    # Kept alive by these names until the kernel has returned.
    x = _rows(x)
    bias = None if bias is None else _values(bias)
    side = None if side is None else _values(side)
    side_weight = None if side_weight is None else _values(side_weight)
    if weight.codebook is None:
        handle = _core.Weight.int8_rows(
            weight.packed.data_ptr(), weight.absmax.data_ptr(), weight.out_features, weight.in_features
        )
    else:
        handle = _core.Weight.four_bit(
            weight.packed.data_ptr(),
            weight.absmax.data_ptr(),
            _address(weight.nested_absmax),
            _address(weight.nested_map),
            _address(weight.nested_offset),
            weight.nested_block_size,
            weight.codebook.data_ptr(),
            weight.block_size,
            weight.out_features,
            weight.in_features,
        )
    _core.linear(
        handle,
        grad_input,
        0 if grad_input else weight.compute,
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        DTYPE_CODES[x.dtype],
        _address(side),
        _code(side),
        _address(side_weight),
        _code(side_weight),
        0 if side is None else side.shape[-1],
        _address(bias),
        _code(bias),
        out.data_ptr(),
        torch.get_num_threads(),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPE_CODES[tensor.dtype]


def explain_linear(
    out_features: int, in_features: int, m: int, dtype: torch.dtype, int8: bool, grad_input: bool, compute: int = 0
) -> dict[str, str]:
    """Which kernel `linear` (or `grad_input`) would run, and why: kernel, isa, compute, reason."""
    compute = 0 if grad_input else compute
    return _core.explain_linear(out_features, in_features, m, DTYPE_CODES[dtype], int8, grad_input, compute)
