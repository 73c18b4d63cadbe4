"""Linear layers in bf16 and fp16 on CPUs without instructions for them, for as long as a context lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.products import emulated, plain, product

_FEW = 8
"""Rows of x below which, without gradients, torch's own product is as fast: nothing shares the fp32 copies of the
weight. Measured on AVX2 (weights of 1024 x 1024 to 32000 x 1024): 1 row 0.2 to 0.3 of the time, 8 rows 0.6 to 1.1."""


class _Linear(torch.autograd.Function):
    """x [..., k] W^T + bias in `dtype`, to which the operands are rounded first, as autocast does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)  # what autocast saves: a layer after this one has it too
        # Of a frozen weight the input is not kept, as torch does not keep it.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = x.shape
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        y = product(_flat(x), weight.to(dtype).t()).view(*x.shape[:-1], weight.shape[0])
        return y if bias is None else y.add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        weight_dtype, bias_dtype = ctx.dtypes
        rows = _flat(grad)
        return (
            product(rows, weight.to(grad.dtype)).view(ctx.shape) if need_x else None,
            product(rows.t(), _flat(x), weight_dtype) if need_weight else None,
            rows.sum(0, dtype=torch.float32).to(bias_dtype) if need_bias else None,
            None,
        )


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear"""
    operands = (input, weight) if bias is None else (input, weight, bias)
    dtypes = {t.dtype for t in operands}
    if torch.is_autocast_enabled("cpu") and torch.float64 not in dtypes:
        dtypes = {torch.get_autocast_dtype("cpu")}
    dtype = dtypes.pop()
    if dtypes or not emulated(dtype) or not all(map(plain, operands)) or weight.dim() != 2 or input.dim() < 2:
        return _torchs(input, weight, bias)
    if input.numel() < _FEW * input.shape[-1] and not torch.is_grad_enabled():
        return _torchs(input, weight, bias)
    return _Linear.apply(input, weight, bias, dtype)


_torchs = F.linear
_lock = threading.Lock()
_contexts = 0


@contextmanager
def lean_products() -> Iterator[None]:
    """Within it, and on a CPU whose torch multiplies bf16 or fp16 matrices a number at a time,
    `torch.nn.functional.linear` computes such products in fp32 and rounds them once, forward and backward; autocast is
    heeded. Anywhere else it does nothing. It holds for all threads, and backward passes may come later, but for those
    that compute layers again (gradient checkpointing). May be nested.
    """
    global _contexts, _torchs
    if not any(map(emulated, (torch.bfloat16, torch.float16))):
        yield
        return
    # Not a TorchFunctionMode: it would be off within backward(), where checkpointed layers run again.
    with _lock:
        _contexts += 1
        if _contexts == 1:
            _torchs, F.linear = F.linear, _linear
    try:
        yield
    finally:
        with _lock:
            _contexts -= 1
            if not _contexts and F.linear is _linear:  # and not what someone has put there since
                F.linear = _torchs
