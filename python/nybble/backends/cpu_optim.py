"""The optimizer step on the CPU: as in `nybble.reference_optim`, bit for bit, in one pass over the memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _core, reference, reference_optim
from ..errors import LayoutError
from ..formats import check_block_size, dynamic_map
from ..reference_optim import AdamWRule
from .addresses import DTYPE_CODES, contiguous_values

_M_MAP, _V_MAP = dynamic_map(True), dynamic_map(False)


def supports(param: Tensor) -> bool:
    """Whether the compiled step takes this parameter: a plain contiguous tensor on the CPU."""
    return param.device.type == "cpu" and param.is_contiguous() and not param.is_neg()


def adamw_32bit(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, rule: AdamWRule, key: int | None = None) -> None:
    """See `nybble.reference_optim.adamw_32bit`; param must be contiguous."""
    reference_optim.check_step(param, grad, key, {"m": m, "v": v})
    grad = _prepared(param, grad)
    _core.adamw_32bit(
        param.data_ptr(),
        DTYPE_CODES[param.dtype],
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        param.numel(),
        rule,
        key is not None,
        key or 0,
        m.data_ptr(),
        v.data_ptr(),
        torch.get_num_threads(),
    )


def adamw_8bit(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    m_absmax: Tensor,
    v_absmax: Tensor,
    block_size: int,
    rule: AdamWRule,
    key: int | None = None,
    name: str = "grad",
) -> None:
    """See `nybble.reference_optim.adamw_8bit`; param must be contiguous."""
    check_block_size(block_size)
    reference_optim.check_step(
        param, grad, key, {}, {"m": m, "v": v}, {"m_absmax": m_absmax, "v_absmax": v_absmax}, block_size
    )
    grad = _prepared(param, grad)
    try:
        _core.adamw_8bit(
            param.data_ptr(),
            DTYPE_CODES[param.dtype],
            grad.data_ptr(),
            DTYPE_CODES[grad.dtype],
            param.numel(),
            rule,
            key is not None,
            key or 0,
            block_size,
            _M_MAP.data_ptr(),
            _V_MAP.data_ptr(),
            m.data_ptr(),
            v.data_ptr(),
            m_absmax.data_ptr(),
            v_absmax.data_ptr(),
            torch.get_num_threads(),
        )
    except _core.NonFiniteBlock as error:
        raise reference_optim.non_finite_moments(name, int(str(error)), block_size) from None


def sum_of_squares(x: Tensor) -> float:
    """The sum of the squares of all elements of `x` (fp32, fp16 or bf16): the same bits for any number of threads.

    Squares are added in fp32 within runs of 4096 elements and 16 columns, so 256 at a time, and in double beyond.
    """
    reference.check_float(x, "x")
    x = contiguous_values(x.detach())
    sums = torch.empty(-(-x.numel() // _core.SQUARES_RUN), dtype=torch.float64, device="cpu")
    _core.sum_of_squares(x.data_ptr(), DTYPE_CODES[x.dtype], x.numel(), sums.data_ptr(), torch.get_num_threads())
    return math.fsum(sums.tolist()) if bool(torch.isfinite(sums).all()) else float(sums.sum())


def _prepared(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient as its address says, and autograd told that param is about to change."""
    if not supports(param):
        raise LayoutError(
            f"param has strides {param.stride()} on {param.device}; the step takes contiguous CPU tensors"
        )
    if not param.is_inference():
        torch.autograd.graph.increment_version(param)
    return contiguous_values(grad)
