"""Scaled dot product attention on the CPU that is fast in training: both passes from nybble's own kernels.

torch's forward kernel reaches a fifth of what the CPU multiplies, and its gradient spends nine tenths of its time
outside its products. The forward pass here is one kernel (`nybble.reference_attention.forward`). In the backward pass
there are five products for a block of queries: two (query key^T and grad_output value^T) end in the softmax's gradient
before they leave the first-level cache (`nybble.reference_attention.scores_grad`), and three are torch's batched
products (grad_value, grad_query, grad_key).

A block is a few heads by a range of queries whose weights fit a core's cache. Under `is_causal` it ends at the last key
that its queries see, so a long text costs half, and never more memory than a block's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from .. import _core
from ..backends import attention as kernels
from ..backends.addresses import DTYPE_CODES
from ..backends.scratch import scratch

#: Bytes of a block's weights, and of the gradient of its scores. Measured on two cores with 2 MiB of second-level cache
#: each, 16 heads of 256 queries and 4 of 2048: half of it takes 1.1 to 1.2 times as long, twice of it 0.95 to 1.2.
_BLOCK_BYTES = 2 << 20
#: ISAs under which torch's forward kernel runs: it uses the matrix unit for both products, nybble's for one.
_TORCH_FORWARD = ("amx",)
#: Fewer queries in a block do not pay for reading the keys again.
_LEAST_QUERIES = 64


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, faster where there is a gradient to compute.

    Wherever `accelerated` says no it is torch's, bit for bit. Elsewhere it is as exact as torch's: scores, sums and the
    gradient of scores are fp32, weights are rounded to the inputs' dtype when they are multiplied. Only a first
    derivative exists, as with torch's own kernel.

    Args:
        query: [B, H, T, D]. key, value: [B, H, S, D], or with `enable_gqa` fewer heads, of which H is a multiple.
        attn_mask: broadcast to [B, H, T, S]; bool, False hides a key, or what is added to the scores.
        dropout_p, is_causal, scale: as torch's.

    Returns:
        [B, H, T, D] in the query's dtype.
    """
    if not torch.compiler.is_compiling() and query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # What autocast does to torch's function, done here, so that training in bf16 has this gradient too.
        query, key, value = _autocast(query), _autocast(key), _autocast(value)
        attn_mask = None if attn_mask is None else _autocast(attn_mask)
        with torch.autocast("cpu", enabled=False):
            return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if torch.compiler.is_compiling() or not accelerated(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    ):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _Attention.apply(query, key, value, attn_mask, is_causal, scale)


def _autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype; fp64 and what is not floating stay, as in autocast itself."""
    return x.to(torch.get_autocast_dtype("cpu")) if x.is_floating_point() and x.dtype != torch.float64 else x


def accelerated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether `attention` of these has nybble's gradient: there is one to compute, on the CPU, where torch would run
    its flash kernel; no dropout, no gradient of the mask, at most 512 numbers a head. Under autocast `attention` casts
    first and asks then, so this says no.
    """
    return (
        torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and query.device.type == "cpu"
        and query.dtype in DTYPE_CODES
        and query.dtype == key.dtype == value.dtype
        and dropout_p == 0.0
        and not torch.is_autocast_enabled("cpu")
        and query.dim() == 4
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in (query, key, value))
        and not torch._C._are_functorch_transforms_active()
        and query.shape[-1] <= _core.MAX_HEAD_DEPTH
        and (attn_mask is None or not (attn_mask.requires_grad or is_causal))
        and (attn_mask is None or attn_mask.dtype in (torch.bool, torch.float32, query.dtype))
        and torch._fused_sdp_choice(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        == SDPBackend.FLASH_ATTENTION.value
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        output, logsumexp = attention_forward(query, key, value, mask, is_causal, scale)
        ctx.save_for_backward(query, key, value, mask, output, logsumexp)
        ctx.is_causal, ctx.scale = is_causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output, logsumexp = ctx.saved_tensors
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            grads = attention_backward(
                grad_output, query, key, value, output, logsumexp, mask, ctx.is_causal, ctx.scale
            )
        if torch.is_grad_enabled():  # create_graph=True
            grads = _NoSecondDerivative.apply(grad_output, query, key, value, *grads)
        return *grads, None, None, None


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and logsumexp [B, H, T] of the scores; arguments as `attention` has checked them."""
    if _core.active_isa() in _TORCH_FORWARD:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
    query, key, value = (_with_rows(x) for x in (query, key, value))
    mask = _expanded(mask, query, key)
    return kernels.forward(query, key, value, mask, 0 if is_causal else None, scale)


def _expanded(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """[B, H, T, S], its columns contiguous."""
    if mask is None:
        return None
    cols = key.shape[2]
    return _with_rows(mask.expand(*mask.shape[:-1], cols)).expand(*query.shape[:3], cols)


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients, tied to what they depend on: without it they would count as constants."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[4:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(
            "nybble.nn.sdpa has a first derivative only, as torch's flash kernel; for a second one run "
            "torch.nn.functional.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
        )


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, in their dtype and layout; arguments as `attention` has checked them.

    The same bits in every run with a number of threads.
    """
    query, key, value, output, grad_output = (_with_rows(x) for x in (query, key, value, output, grad_output))
    mask = _expanded(mask, query, key)
    grads = tuple(torch.empty_like(x) for x in (query, key, value))
    work = _Work(query, key, value, output, grad_output, logsumexp, mask, is_causal, scale, *grads)
    product = _product_dtype(query.dtype)
    for part in _parts(work, product):
        _backward_part(part, product)
    return grads  # type: ignore[return-value]


@dataclass(frozen=True)
class _Work:
    """Tensors of one call, or of some of its batches and heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    grad_output: Tensor
    logsumexp: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor


def _with_rows(x: Tensor) -> Tensor:
    """`x` with contiguous columns and strides that are not negative: the same tensor nearly always."""
    x = x.detach()
    if x.is_neg() or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return x.resolve_neg().contiguous()
    return x


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the weights are rounded to for the products with them: bf16 where torch multiplies it in hardware."""
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _queries_of_block(heads: int, rows: int, cols: int, product: torch.dtype) -> int:
    most = _BLOCK_BYTES // (heads * cols * product.itemsize)
    if most >= rows:
        return rows
    return max(_LEAST_QUERIES, most // _LEAST_QUERIES * _LEAST_QUERIES)


def _parts(work: _Work, product: torch.dtype) -> list[_Work]:
    """Some batches with all their heads, or some heads of a batch, so many that all their weights make a block."""
    batches, heads, rows = work.query.shape[:3]
    kv_heads, cols = work.key.shape[1:3]
    group = heads // kv_heads
    weights = max(1, rows * cols * product.itemsize)  # of a head
    together = max(1, _BLOCK_BYTES // (group * weights))  # kv heads
    if together >= kv_heads:
        step, kv_step = min(batches, together // kv_heads), kv_heads
    else:
        step, kv_step = 1, -(-kv_heads // -(-kv_heads // together))  # parts alike in size
    parts = []
    for b in range(0, batches, step):
        for h in range(0, kv_heads, kv_step):
            whole = (slice(b, b + step), slice(h * group, (h + kv_step) * group))
            shared = (slice(b, b + step), slice(h, h + kv_step))
            parts.append(
                _Work(
                    work.query[whole],
                    work.key[shared],
                    work.value[shared],
                    work.output[whole],
                    work.grad_output[whole],
                    work.logsumexp[whole],
                    None if work.mask is None else work.mask[whole],
                    work.is_causal,
                    work.scale,
                    work.grad_query[whole],
                    work.grad_key[shared],
                    work.grad_value[shared],
                )
            )
    return parts


def _backward_part(work: _Work, product: torch.dtype) -> None:
    batches, heads, rows = work.query.shape[:3]
    kv_heads, cols = work.key.shape[1:3]
    if batches * heads * rows * cols == 0:
        for grad in (work.grad_query, work.grad_key, work.grad_value):
            grad.zero_()
        return
    queries = _queries_of_block(batches * heads, rows, cols, product)
    sums = None
    if queries < rows:
        sums = [scratch(f"sums of {i}", x.shape, torch.float32) for i, x in enumerate((work.key, work.value))]
    key = _flat(work.key, kv_heads, product)
    # Under a diagonal the last queries see most, so that the first product of a sum is as long as the sum.
    for first in reversed(range(0, rows, queries)):
        here = slice(first, min(first + queries, rows))
        seen = min(cols, here.stop) if work.is_causal else cols
        weights = (batches, heads, here.stop - first, seen)
        p, ds = scratch("p", weights, product), scratch("ds", weights, product)
        query, grad_output = work.query[:, :, here], work.grad_output[:, :, here]
        kernels.scores_grad(
            query,
            work.key[:, :, :seen],
            work.value[:, :, :seen],
            work.output[:, :, here],
            grad_output,
            work.logsumexp[:, :, here],
            None if work.mask is None else work.mask[:, :, here, :seen],
            first if work.is_causal else None,
            work.scale,
            p,
            ds,
        )
        # Heads that share a key are rows of one product, which sums their gradients.
        p, ds = (x.view(batches * kv_heads, -1, seen) for x in (p, ds))
        query, grad_output = (_flat(x, kv_heads, product) for x in (query, grad_output))
        _multiply(ds, key[:, :seen], work.grad_query[:, :, here])
        if sums is None:
            _multiply(ds.mT, query, work.grad_key[:, :, :seen])
            _multiply(p.mT, grad_output, work.grad_value[:, :, :seen])
        else:
            _add_product(ds.mT, query, sums[0][:, :, :seen], here.stop == rows)
            _add_product(p.mT, grad_output, sums[1][:, :, :seen], here.stop == rows)
    seen = min(rows, cols) if work.is_causal else cols
    for i, grad in enumerate((work.grad_key, work.grad_value)):
        if sums is not None:
            grad[:, :, :seen].copy_(sums[i][:, :, :seen])
        grad[:, :, seen:] = 0


def _flat(x: Tensor, kv_heads: int, product: torch.dtype) -> Tensor:
    """[B, H, n, d] as [B * kv_heads, H / kv_heads * n, d] in the dtype of the products; a view where it can be."""
    return x.reshape(x.shape[0] * kv_heads, -1, x.shape[-1]).to(product)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out [B, H, n, d] = left [B * kv_heads, H / kv_heads * n, k] . right [B * kv_heads, k, d]."""
    shape = (left.shape[0], left.shape[1], right.shape[2])
    if out.is_contiguous() and out.dtype == left.dtype:
        torch.bmm(left, right, out=out.view(shape))
    else:
        out.copy_(torch.bmm(left, right, out=scratch("product", shape, left.dtype)).view(out.shape))


def _add_product(left: Tensor, right: Tensor, out: Tensor, first: bool) -> None:
    """out [B, H, n, d] += left . right, or the first of these products; in fp32, whatever a product is rounded to."""
    shape = (left.shape[0], left.shape[1], right.shape[2])
    product = torch.bmm(left, right, out=scratch("product", shape, left.dtype)).view(out.shape)
    out.copy_(product) if first else out.add_(product)
