"""One step of AdamW beside torch.optim.AdamW and bitsandbytes: moments in fp32 and in 8 bits; the gradient's norm.

python bench/optimizer.py [--shape N,K ...]

A contestant steps one parameter [N, K] after the other. Each has parameters and state of its own; gradients are shared.
Bytes are what a step has to read and write, of the parameter's dtype and of the state. torch keeps the moments of a
bf16 parameter in bf16, 4 bytes an element where fp32 moments take 8 and 8-bit ones 2.03.
"""

from __future__ import annotations

import peers
import torch
from harness import Call
from session import SHAPES, Session, parse
from torch import Tensor, nn

from nybble.training.optim import AdamW, clip_scale, state_bytes

Optimizers = list[torch.optim.Optimizer]


def stepping(optimizers: Optimizers) -> Call:
    """One optimizer's step after the other's."""
    return lambda turn: optimizers[turn % len(optimizers)].step()


def contestants(gradients: list[Tensor], session: Session) -> tuple[dict[str, Call], dict[str, int]]:
    """A call each, and the bytes of state that each keeps for one parameter."""

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.randn_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(made, gradients, strict=True):
            parameter.grad = gradient
        return made

    made: dict[str, Optimizers] = {
        "nybble, 8 bits": [AdamW([p], bits=8) for p in parameters()],
        "nybble, 32 bits": [AdamW([p]) for p in parameters()],
        "torch, fused": [torch.optim.AdamW([p], fused=True) for p in parameters()],
        "torch, foreach": [torch.optim.AdamW([p], foreach=True) for p in parameters()],
    }
    if gradients[0].dtype == torch.bfloat16:
        made["nybble, 8 bits, stochastic"] = [AdamW([p], bits=8, stochastic_rounding=True) for p in parameters()]
    try:
        optim = peers.bitsandbytes_package().optim
        made["bitsandbytes, 8 bits"] = [optim.AdamW8bit([p]) for p in parameters()]
        made["bitsandbytes, 32 bits"] = [optim.AdamW32bit([p]) for p in parameters()]
    except peers.Missing as reason:
        session.note(str(reason))
    for optimizers in made.values():  # state comes into being with the first step
        for optimizer in optimizers:
            optimizer.step()
    return (
        {name: stepping(optimizers) for name, optimizers in made.items()},
        {name: state_bytes(optimizers[0]) for name, optimizers in made.items()},
    )


def norms(gradients: list[Tensor]) -> dict[str, Call]:
    """The norm of one gradient and the factor that clips it; torch multiplies the gradient with it."""
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    at = len(parameters) // 2
    return {
        "nybble": lambda turn: clip_scale([parameters[turn % len(parameters)]], 1e9),
        "torch, clip_grad_norm_": lambda turn: nn.utils.clip_grad_norm_(parameters[(turn + at) % len(parameters)], 1e9),
    }


def main() -> None:
    args = parse(__doc__)
    session = Session("optimizer", args)
    for n, k in args.shapes if args.shape else SHAPES[:1]:
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            size = n * k * dtype.itemsize
            # A step is no short call: one a turn, and the others' state has gone through the caches by the next.
            copies = max(2, args.rotation // size)
            gradients = [torch.randn(n, k, dtype=dtype) for _ in range(copies)]
            calls, state = contestants(gradients, session)
            facts = {"n": n, "k": k, "dtype": name}
            session.case(f"step, {name}", f"{n} x {k}", calls, what="step", state_bytes=state, **facts)
            session.case(f"norm, {name}", f"{n} x {k}", norms(gradients), what="norm", **facts)
            del calls
    session.finish()


if __name__ == "__main__":
    main()
