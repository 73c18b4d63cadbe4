"""Attention in training, bf16, causal: nybble.nn.sdpa beside torch's scaled_dot_product_attention.

python bench/attention.py [--seconds S]

Tables of the backward pass and of the two together. Inputs lie as a decoder layer makes them:
queries and keys head after head, values and gradients with their heads side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Call
from session import Session, parse
from torch import Tensor

from nybble.nn.sdpa import attention

#: Batches, heads, heads of keys and values, tokens, head size.
SIZES = ((4, 16, 16, 256, 64), (1, 32, 32, 2048, 128), (4, 9, 3, 512, 64))
CONTESTANTS = {"nybble": attention, "torch sdpa": F.scaled_dot_product_attention}


def inputs(batches: int, heads: int, kv_heads: int, tokens: int, depth: int) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, which need a gradient, and the output's gradient."""

    def rows(count: int, side_by_side: bool) -> Tensor:
        shape = (batches, tokens, count, depth) if side_by_side else (batches, count, tokens, depth)
        x = torch.randn(shape).bfloat16()
        return x.transpose(1, 2) if side_by_side else x

    tensors = [rows(heads, False), rows(kv_heads, False), rows(kv_heads, True)]
    return [x.requires_grad_() for x in tensors], rows(heads, True)


def calls(size: tuple[int, int, int, int, int]) -> dict[str, dict[str, Call]]:
    """The contestants of each table."""
    tensors, grad = inputs(*size)
    shared = {"is_causal": True, "enable_gqa": size[1] != size[2]}
    outputs = {name: function(*tensors, **shared) for name, function in CONTESTANTS.items()}

    def backward(output: Tensor) -> Call:
        return lambda turn: torch.autograd.grad(output, tensors, grad, retain_graph=True)

    def both(function: Callable[..., Tensor]) -> Call:
        return lambda turn: torch.autograd.grad(function(*tensors, **shared), tensors, grad)

    return {
        "backward": {name: backward(output) for name, output in outputs.items()},
        "forward and backward": {name: both(function) for name, function in CONTESTANTS.items()},
    }


def main() -> None:
    args = parse(__doc__, seconds=2.0)
    session = Session("attention", args)
    for size in SIZES:
        batches, heads, _, tokens, depth = size
        product = batches * heads * tokens * tokens * depth  # half of its 2 FLOPs are above the diagonal
        for what, contestants in calls(size).items():
            operations = float(product * (5 if what == "backward" else 7))
            column = "x".join(map(str, size))
            session.case(what, column, contestants, operations=operations, n=heads, k=depth, m=tokens, what=what)
    session.finish()


if __name__ == "__main__":
    main()
