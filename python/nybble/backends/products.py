"""Matrix products in 16 bits on CPUs that have no instructions for them.

There torch multiplies bf16 and fp16 matrices a number at a time: 100 times slower than fp32 for some layouts. `product`
computes them in fp32, of copies that are made a few megabytes at a time, and rounds the result once. Everywhere else
it is torch's own product.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .. import _core
from ..errors import LayoutError
from .scratch import scratch
from .weight import PLAIN

_BLOCK = 1 << 20
"""fp32 numbers of an operand, or of the result, at a time."""

_NATIVE = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@cache
def emulated(dtype: torch.dtype) -> bool:
    """Whether torch multiplies CPU matrices of this dtype without instructions made for it."""
    if dtype not in _NATIVE:
        return False
    # Private, but what torch's own matmul asks before it hands a product to oneDNN; it may go.
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{_NATIVE[dtype]}_supported", None)
    if supported is not None:
        return not supported()
    return not {"avx512bf16", "amx"} & set(_core.isas())


def plain(x: Tensor) -> bool:
    """Whether x is a CPU tensor whose memory can be used, and nobody watches operators go by."""
    return (
        x.is_cpu
        and type(x) in PLAIN
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def widened(x: Tensor) -> bool:
    """Whether `product` computes with x in fp32 instead of its own dtype."""
    return emulated(x.dtype) and plain(x) and not (x.requires_grad and torch.is_grad_enabled())


def product(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """left [m, k] . right [k, n] of one dtype, in `dtype` (default: theirs); strides are any. Differentiable."""
    dtype = dtype or left.dtype
    if widened(left) and widened(right):
        return product_into(left, right, torch.empty(left.shape[0], right.shape[1], dtype=dtype))
    if left.is_cpu and emulated(left.dtype):  # a compiler looks on, or a gradient is wanted: the same in torch's terms
        return (left.float() @ right.float()).to(dtype)
    return (left @ right).to(dtype)


def product_into(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """`product`, written into `out` [m, n], or added to it in out's precision. No gradient reaches the operands."""
    left, right, out = left.detach(), right.detach(), out.detach()
    if not widened(left) or not widened(right):
        if out.dtype != left.dtype:
            result = torch.mm(left, right)
            return out.add_(result) if add else out.copy_(result)
        return out.addmm_(left, right) if add else torch.mm(left, right, out=out)
    (m, k), n = left.shape, right.shape[1]
    if right.shape[0] != k or out.shape != (m, n):
        raise LayoutError(
            f"shapes {list(left.shape)} and {list(right.shape)} have no product of shape {list(out.shape)}"
        )
    if not (m and n and k):
        return out if add else out.zero_()
    if k > max(m, n):
        return _over_terms(left, right, out, add)
    if m >= n:
        right, step = _wide("right", right), max(1, _BLOCK // max(k, n))
        for rows in _blocks(m, step):
            _write(_wide("left", left[rows]), right, out[rows], add)
    else:
        left, step = _wide("left", left), max(1, _BLOCK // max(k, m))
        for columns in _blocks(n, step):
            _write(left, _wide("right", right[:, columns]), out[:, columns], add)
    return out


def _over_terms(left: Tensor, right: Tensor, out: Tensor, add: bool) -> Tensor:
    """The sum over k in pieces."""
    m, n = out.shape
    total = out if out.dtype == torch.float32 else scratch("product sum", (m, n), torch.float32)
    for i, terms in enumerate(_blocks(left.shape[1], max(1, _BLOCK // max(m, n)))):
        pair = _wide("left", left[:, terms]), _wide("right", right[terms])
        if i or (add and total is out):
            total.addmm_(*pair)
        else:
            torch.mm(*pair, out=total)
    if total is not out:
        out.add_(total) if add else out.copy_(total)
    return out


def _blocks(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _wide(name: str, x: Tensor) -> Tensor:
    """An fp32 copy that keeps the order in which x lies in memory."""
    if x.stride(0) < x.stride(1):
        return scratch(f"product {name}", (x.shape[1], x.shape[0]), torch.float32).copy_(x.t()).t()
    return scratch(f"product {name}", x.shape, torch.float32).copy_(x)


def _write(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    if out.dtype == torch.float32 and out.is_contiguous():
        out.addmm_(left, right) if add else torch.mm(left, right, out=out)
        return
    result = torch.mm(left, right, out=scratch("product block", out.shape, torch.float32))
    out.add_(result) if add else out.copy_(result)
