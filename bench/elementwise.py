"""RMSNorm, SwiGLU and the rotary embedding in bf16, forward and backward: fused, as models write them, and a copy.

python bench/elementwise.py [--m M ...] [--shape HIDDEN,INNER ...]

"eager torch" are the formulas of transformers' modeling files, with their conversions to fp32. copy_ moves as many
bytes between buffers that it has already as the fused function reads and writes; that one makes its result anew in
every call, as eager torch does. Backward is what torch.autograd.grad takes, the weight of the norm frozen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Call, copies_for
from session import Session, parse
from torch import Tensor
from torch.nn import functional

from nybble.nn import fused

#: Hidden and inner sizes of models of 170M, 1B and 7B parameters.
SHAPES = ((768, 2048), (2048, 8192), (4096, 11008))
HEAD = 64
EPS = 1e-6


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def eager_gated(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def eager_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


Function = Callable[..., Tensor]


def operations(
    m: int, hidden: int, inner: int
) -> dict[str, tuple[Function, Function, Callable[[], list[Tensor]], int]]:
    """Of each: fused, eager, a maker of inputs that need gradients, how many tensors of their size forward moves."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).bfloat16().requires_grad_()

    weight = torch.ones(hidden).bfloat16()
    angles = torch.outer(torch.arange(m).float(), 1e4 ** (-torch.arange(0, HEAD, 2) / HEAD)).repeat(1, 2).unsqueeze(0)
    tables = angles.cos().bfloat16(), angles.sin().bfloat16()

    def heads() -> Tensor:
        return normal(1, m, hidden // HEAD, HEAD).detach().transpose(1, 2).requires_grad_()

    def turned(x: Tensor) -> Tensor:
        return fused.rotary(x, x[:, :0], *tables)[0]

    return {
        f"RMSNorm, {hidden}": (
            lambda x: fused.rms_norm(x, weight, EPS),
            lambda x: eager_norm(x, weight),
            lambda: [normal(m, hidden)],
            2,
        ),
        f"SwiGLU, {inner}": (fused.gated, eager_gated, lambda: [normal(m, inner), normal(m, inner)], 3),
        f"rotary, {hidden // HEAD} heads of {HEAD}": (turned, lambda x: eager_rotary(x, *tables), lambda: [heads()], 2),
    }


def forward(function: Function, copies: list[list[Tensor]]) -> Call:
    inputs = [[x.detach() for x in each] for each in copies]
    return lambda turn: function(*inputs[turn % len(inputs)])


def backward(function: Function, copies: list[list[Tensor]]) -> Call:
    results = [function(*each) for each in copies]
    towards = [torch.randn_like(y) for y in results]

    def call(turn: int) -> object:
        i = turn % len(results)
        return torch.autograd.grad(results[i], copies[i], towards[i], retain_graph=True)

    return call


def copy(size: int, tensors: int, rotation: int) -> Call:
    """Reads and writes so many tensors of `size` bytes in all."""
    elements = size * tensors // 4  # of two bytes each, half of them read
    sources = [torch.randn(elements).bfloat16() for _ in range(copies_for(2 * elements, rotation))]
    out = torch.empty_like(sources[0])
    return lambda turn: out.copy_(sources[turn % len(sources)])


def main() -> None:
    args = parse(__doc__, rows=(1024,))
    session = Session("elementwise", args)
    for hidden, inner in args.shapes if args.shape else SHAPES:
        for m in args.rows:
            for name, (ours, eager, make, moved) in operations(m, hidden, inner).items():
                size = make()[0].nbytes
                copies = [make() for _ in range(copies_for(size, args.rotation // 4))]
                # Backward reads the gradient and what forward read (but for rotary's, which needs none of it), and
                # writes a gradient for each input.
                both = {"forward": moved, "backward": moved if name.startswith("rotary") else 2 * moved - 1}
                for direction, tensors in both.items():
                    run = forward if direction == "forward" else backward
                    calls = {
                        "nybble": run(ours, copies),
                        "eager torch": run(eager, copies),
                        "copy_": copy(size, tensors, args.rotation),
                    }
                    what = f"{name.split(',')[0]} {direction}"
                    session.case(what, f"M {m}, {name.split(', ')[1]}", calls, what=what, m=m, moved=size * tensors)
    session.finish()


if __name__ == "__main__":
    main()
