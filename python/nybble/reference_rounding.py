"""The executable specification of data-aware rounding: codes of a weight, chosen by the moments of its layer's inputs.

Plain torch, in float64; the compiled kernels (`nybble.backends.cpu`) have the same signatures and compute in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import LayoutError, UnsupportedDtypeError
from .formats import check_block_size
from .reference_checks import check_codebook


def round_feedback(
    target: Tensor,
    factor: Tensor,
    absmax: Tensor,
    codebook: Tensor | None,
    block_size: int,
    order: Tensor | None = None,
) -> Tensor:
    """Codes of `target`, a column at a time, the error of each made up for by those that follow (GPTQ).

    The measure is (W - Q) H (W - Q)^T for second moments H of the layer's inputs (Frantar et al. 2022, arXiv
    2210.17323). At position p, with e = (w_p - q_p) / U_pp, every later column i becomes w_i - e U_pi.

    Args:
        target: fp32 [rows, cols].
        factor: U, fp32 [cols, cols], upper triangular, U^T U = H^-1, both in the order of the positions.
        absmax: fp32 scales, of the blocks of the flattened target (4 bits) or of its rows (int8).
        codebook: fp32 [16]; None: int8.
        block_size: of 4-bit scales.
        order: int32 [cols]: position p is column order[p]; None: as they are.

    Returns:
        [rows, cols], uint8 indices into the codebook, or int8.
    """
    check_rounding(target, factor, absmax, codebook, block_size, order)
    rows, cols = target.shape
    positions = torch.arange(cols) if order is None else order.long()
    rest, u = target.double()[:, positions], factor.double()
    scales = _scale_per_element(absmax, codebook, block_size, rows, cols)[:, positions]
    codes = torch.empty(rows, cols, dtype=torch.uint8 if codebook is not None else torch.int8)
    for p in range(cols):
        code = _nearest_code(rest[:, p].float(), scales[:, p], codebook)
        codes[:, positions[p]] = code
        error = (rest[:, p] - _value_of(code, scales[:, p], codebook)) / u[p, p]
        rest[:, p + 1 :] -= error[:, None] * u[p, p + 1 :]
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
    """Better codes of `target`: each in turn becomes the best one, all others given (arXiv 2309.01885).

    In units of the code's own error the best value of column p is q_p + ((W - Q) H)_p / H_pp, and what is picked is the
    code nearest to it, so (W - Q) H (W - Q)^T never rises. Ends early when a sweep changes nothing.

    Args:
        codes: where to start, as `round_feedback` returns them; not changed.
        hessian: H, fp32 [cols, cols], symmetric, in the order of the positions.
        sweeps: over all columns, at most.
        target, absmax, codebook, block_size, order: as in `round_feedback`.
    """
    check_rounding(target, hessian, absmax, codebook, block_size, order)
    rows, cols = target.shape
    positions = torch.arange(cols) if order is None else order.long()
    h, codes = hessian.double(), codes.clone()
    scales = _scale_per_element(absmax, codebook, block_size, rows, cols)
    gradient = (target.double() - _value_of(codes, scales, codebook))[:, positions] @ h
    for _ in range(sweeps):
        before = codes.clone()
        for p in range(cols):
            column = positions[p]
            old = _value_of(codes[:, column], scales[:, column], codebook)
            aim = (old + gradient[:, p] / h[p, p]).float()
            codes[:, column] = _nearest_code(aim, scales[:, column], codebook)
            gradient += (old - _value_of(codes[:, column], scales[:, column], codebook))[:, None] * h[p]
        if torch.equal(codes, before):
            break
    return codes


def check_rounding(
    target: Tensor,
    matrix: Tensor,
    absmax: Tensor,
    codebook: Tensor | None,
    block_size: int,
    order: Tensor | None,
) -> None:
    """Raises LayoutError, UnsupportedDtypeError or FormatError unless these are what rounding takes."""
    for name, value in (("target", target), ("matrix", matrix), ("absmax", absmax)):
        if value.dtype != torch.float32:
            raise UnsupportedDtypeError(f"{name} has dtype {value.dtype}; it must be float32")
        if not value.is_contiguous() or value.device != target.device:
            raise LayoutError(f"{name} must be contiguous and on {target.device}, where target is")
    if target.dim() != 2:
        raise LayoutError(f"target has shape {tuple(target.shape)}; it must be [rows, cols]")
    rows, cols = target.shape
    if tuple(matrix.shape) != (cols, cols):
        raise LayoutError(f"matrix has shape {tuple(matrix.shape)}; for {cols} columns it must be [{cols}, {cols}]")
    if cols and not bool((matrix.diagonal() > 0).all()):
        raise LayoutError("matrix has a diagonal that is not positive everywhere")
    if codebook is not None:
        check_codebook(codebook, 16, target.device)
        check_block_size(block_size)
    need = rows if codebook is None else -(-rows * cols // block_size)
    if tuple(absmax.shape) != (need,):
        raise LayoutError(f"absmax has shape {tuple(absmax.shape)}; {list(target.shape)} needs [{need}]")
    if not bool((absmax != 0).all()):
        raise LayoutError("absmax holds a scale that is 0; 1e-38 stands for nothing")
    if order is not None:
        if order.dtype != torch.int32 or tuple(order.shape) != (cols,) or not order.is_contiguous():
            raise LayoutError(f"order is {order.dtype} {tuple(order.shape)}; it must be int32 [{cols}], contiguous")
        if not torch.equal(order.sort().values, torch.arange(cols, dtype=torch.int32, device=order.device)):
            raise LayoutError("order is not a permutation of the columns")


def _scale_per_element(absmax: Tensor, codebook: Tensor | None, block_size: int, rows: int, cols: int) -> Tensor:
    if codebook is None:
        return absmax[:, None].expand(rows, cols)
    return absmax.repeat_interleave(block_size)[: rows * cols].view(rows, cols)


def _nearest_code(values: Tensor, scales: Tensor, codebook: Tensor | None) -> Tensor:
    if codebook is not None:
        # Not clamped as in `pick_codes`: int4's lowest code lies below -1.
        order = torch.argsort(codebook, stable=True)
        ascending = codebook[order]
        s = values * (1.0 / scales)
        return order.to(torch.uint8)[torch.bucketize(s, (ascending[:-1] + ascending[1:]) / 2)]
    return ((values * (1.0 / scales)).clamp(-1, 1) * 127).round().to(torch.int8)


def _value_of(codes: Tensor, scales: Tensor, codebook: Tensor | None) -> Tensor:
    values = codes.float() * (scales / 127) if codebook is None else codebook[codes.long()] * scales
    return values.double()
