"""What activation checkpointing computes again, and how to let it be less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import PackedWeight
from .operators import bodies, calls


@contextmanager
def saving_first() -> Iterator[None]:
    """Within it, lora_linear saves what its backward pass needs before it multiplies, not after.

    Activation checkpointing (torch.utils.checkpoint, use_reentrant=False) computes a layer again only until it has the
    last tensor that was saved. So a layer's last linear module, whose output only its sum with the residual goes on
    from, is not multiplied again: 22% of a Llama layer's products. What computes again must find what the forward pass
    found, so the context lasts for both. It costs a node of autograd's graph a call.
    """
    before, calls.differentiated_lora_linear = calls.differentiated_lora_linear, _lora_linear
    try:
        yield
    finally:
        calls.differentiated_lora_linear = before


def _lora_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    ops.check_lora(x, weight, lora_a, lora_b, mask)
    with torch.no_grad():
        side = ops.side_factor(x, lora_a, scaling, mask)
    saved = _Saved.apply(bias, x, side, lora_a, lora_b, mask).grad_fn
    return _SavedLoRALinear.apply(x, weight, bias, lora_a, lora_b, scaling, side, saved)


# Private, and may go; then what a node holds goes with the graph.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class _Saved(torch.autograd.Function):
    """A node that only holds tensors; no gradient goes through it."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        raise AssertionError("no gradient goes through here")


class _SavedLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        side: Tensor,
        saved: Any,
    ) -> Tensor:
        ctx.weight, ctx.scaling, ctx.saved = weight, scaling, saved
        ctx.set_materialize_grads(False)
        return bodies.linear_body(x.detach(), weight, bias, side, lora_b)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 8
        need_x, _, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
        needs = (need_x, need_bias, need_a, need_b)
        if ctx.saved is None:
            raise RuntimeError(
                "backward() for the second time through a graph that was not kept; use retain_graph=True"
            )
        tensors = ctx.saved.saved_tensors
        if not _keeps_graph():
            ctx.saved = None  # as torch frees what a node has saved; else layers' inputs stay until the last is done
        dx, dbias, da, db = ops.lora_gradients(needs, g, ctx.weight, tensors, ctx.scaling)
        return dx, None, dbias, da, db, None, None, None
