"""The experts of a mixture, one at a time, over frozen weights: packed ones are multiplied as they are.

transformers keeps the experts of a layer in parameters of three dimensions and multiplies with all of them at once.
Where they are packed (`nybble.nn.experts`) that decodes every expert in every forward, and autograd keeps the decoded
ones until the backward pass: all experts of all layers, in 16 bits. Here each expert that tokens go to is one product
on its packed bytes in either direction, and of a layer only the values before the gate are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..backends import BoundWeight, PackedWeight
from ..backends.products import emulated, product
from .experts import _OnUse, computed_parameters

#: How transformers calls this way to compute experts, in `config._experts_implementation`.
NAME = "nybble"
#: Rows of an expert's 16-bit product come in multiples of it: oneDNN generates kernels for every number of rows that it
#: meets, and tokens are spread over experts anew in every step (600 MB of kernels in ten steps of a model of 75 M).
_ROWS = 32

_bound: WeakKeyDictionary[_OnUse, dict[int, tuple[int, list[PackedWeight]]]] = WeakKeyDictionary()


def use(model: nn.Module) -> None:
    """Let the experts of a transformers model be computed here; without effect on models that have none, on versions of
    transformers without a choice of implementations, and where another one than its usual was chosen."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(module, "_apply_gate") and getattr(config, "_experts_implementation", None) == "grouped_mm":
            config._experts_implementation_internal = NAME


def forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's experts.

    Args:
        module: a transformers module of experts.
        hidden: [tokens, width]. index, weights: [tokens, k], each token's experts and their shares.

    Returns:
        [tokens, width] in the dtype of `hidden`; differentiable once, in `hidden` and `weights`.
    """
    # Without gradients transformers' products with plain weights are as fast.
    ours = bool(computed_parameters(module)) or torch.is_grad_enabled() or emulated(hidden.dtype)
    sides = _sides(module) if ours and not _watched(module, hidden) else None
    if sides is None:
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(module, hidden, index, weights)
    return _Experts.apply(hidden, weights, index, module, *sides)


def _watched(module: Any, hidden: Tensor) -> bool:
    """Whether this is for transformers to compute: somebody follows its operations, which here wait for the counts of
    tokens, or trains what is frozen here."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(hidden) not in (Tensor, nn.Parameter)
        or hidden.device.type == "meta"
        or hidden.dtype == torch.float64
        or (hidden.is_cuda and torch.cuda.is_current_stream_capturing())
        or module._is_expert_parallel
        or module.has_post_expert_norm
        or (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()))
    )


# ---- one projection of all experts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """A projection: `product(e, x)` is x [n, in] through expert e without its bias, `back(e, g)` the gradient of x.

    Attributes:
        bias: [experts, out], or None.
    """

    product: Callable[[int, Tensor], Tensor]
    back: Callable[[int, Tensor], Tensor]
    bias: Tensor | None


def _sides(module: Any) -> tuple[_Side, _Side] | None:
    """What comes before the activation and what comes after; None where a weight cannot be taken expert by expert."""
    first = _side(module, "gate_up_proj" if module.has_gate else "up_proj")
    last = _side(module, "down_proj")
    return None if first is None or last is None else (first, last)


def _side(module: Any, name: str) -> _Side | None:
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    decoder = computed_parameters(module).get(name)
    if decoder is None:
        weight = getattr(module, name)
        if not _is_plain(weight):
            return None
        across = weight if module.is_transposed else weight.mT  # [experts, in, out]
        return _Side(lambda e, x: _times(x, across[e]), lambda e, g: _times(g, across[e].t()), bias)
    original: Any = module.parametrizations[name].original
    cut = decoder.expert(original, 0)
    if cut is None or (module.is_transposed and len(cut) > 1):
        return None

    def parts(e: int) -> list[PackedWeight]:
        return _parts(decoder, original, e)

    if module.is_transposed:  # [in, out]: what is a gradient for others is the product here
        return _Side(lambda e, x: ops.grad_input(x, parts(e)[0]), lambda e, g: ops.linear(g, parts(e)[0]), bias)
    return _Side(
        lambda e, x: _joined([ops.linear(x, part) for part in parts(e)]), lambda e, g: _back(g, parts(e)), bias
    )


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.dim() == 3 and weight.is_floating_point()


def _parts(decoder: _OnUse, original: Tensor, e: int) -> list[PackedWeight]:
    """The packed weights whose rows make up expert e's, bound once."""
    known = _bound.setdefault(decoder, {})
    place = decoder.place(original, e)
    if e not in known or known[e][0] != place:
        if e in known:  # the module was moved or loaded anew: nothing of what it had is to live on
            known.clear()
        tensors = decoder.expert(original, e)
        assert tensors is not None
        known[e] = place, [BoundWeight.of(tensor.packed_weight()) for tensor in tensors]
    return known[e][1]


def _joined(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.cat(values, -1)


def _back(g: Tensor, parts: list[PackedWeight]) -> Tensor:
    pieces = g.split([part.out_features for part in parts], -1)
    total = ops.grad_input(pieces[0].contiguous(), parts[0])
    for piece, part in zip(pieces[1:], parts[1:], strict=True):
        total += ops.grad_input(piece.contiguous(), part)
    return total


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, k] . weight [k, m]."""
    x, weight = x.detach(), weight.detach().to(x.dtype)
    if not x.is_cpu or x.dtype in (torch.float32, torch.float64):
        return x @ weight
    if emulated(x.dtype):
        return product(x, weight)
    rows = len(x)
    wanted = 1 << (rows - 1).bit_length() if rows < _ROWS else math.ceil(rows / _ROWS) * _ROWS
    return x @ weight if wanted == rows else (F.pad(x, (0, 0, 0, wanted - rows)) @ weight)[:rows]


# ---- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spread:
    """Pairs of a token and one of its experts, sorted by expert: `tokens` and the pair's place in [tokens, k]."""

    pairs: Tensor
    tokens: Tensor
    counts: list[int]

    @classmethod
    def of(cls, index: Tensor, experts: int) -> _Spread:
        flat = index.reshape(-1)
        pairs = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts).tolist()
        return cls(pairs, pairs // index.shape[-1], counts)

    def experts(self) -> Iterator[tuple[int, slice]]:
        """Each expert that tokens go to, with its pairs."""
        start = 0
        for e, count in enumerate(self.counts):
            if count:
                yield e, slice(start, start + count)
            start += count


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, index: Tensor, module: Any, first: _Side, last: _Side
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        spread = _Spread.of(index, module.num_experts)
        needed = any(ctx.needs_input_grad[:2])
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        before: list[Tensor] = []
        with torch.autocast(device, enabled=False):
            shares = weights.reshape(-1).float()
            for e, here in spread.experts():
                inner = _biased(first, e, first.product(e, hidden[spread.tokens[here]].to(dtype)))
                after = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
                y = _biased(last, e, last.product(e, after))
                out.index_add_(0, spread.tokens[here], y.float().mul_(shares[spread.pairs[here], None]))
                if needed:
                    before.append(inner)
        if needed:
            ctx.save_for_backward(weights, spread.pairs, spread.tokens, *before)
            ctx.counts, ctx.module, ctx.sides, ctx.like = spread.counts, module, (first, last), hidden.dtype
            ctx.work = dtype
        return out.to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, pairs, tokens, *before = ctx.saved_tensors
        spread = _Spread(pairs, tokens, ctx.counts)
        (first, last), module = ctx.sides, ctx.module
        grad_hidden = torch.zeros(grad.shape, dtype=torch.float32, device=grad.device)
        shares, grad_shares = weights.reshape(-1).float(), torch.zeros(weights.numel(), device=grad.device)
        with torch.autocast(grad.device.type, enabled=False):
            for (e, here), inner in zip(spread.experts(), before, strict=True):
                share = shares[spread.pairs[here], None]
                g = grad[spread.tokens[here]].to(ctx.work)
                with torch.enable_grad():
                    leaf = inner.detach().requires_grad_()
                    after = module._apply_gate(leaf) if module.has_gate else module.act_fn(leaf)
                through = last.back(e, g).float()  # the gradient of `after`, but for the token's share
                grad_share = (through * after.detach()).sum(-1)
                if last.bias is not None:
                    grad_share += g.float() @ last.bias[e].float()
                grad_shares[spread.pairs[here]] = grad_share
                (grad_inner,) = torch.autograd.grad(after, leaf, through.mul_(share).to(after.dtype))
                grad_hidden.index_add_(0, spread.tokens[here], first.back(e, grad_inner.to(ctx.work)).float())
        return grad_hidden.to(ctx.like), grad_shares.view_as(weights).to(weights.dtype), None, None, None, None


def _biased(side: _Side, e: int, y: Tensor) -> Tensor:
    return y if side.bias is None else y.add_(side.bias[e].to(y.dtype))
