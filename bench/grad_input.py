"""The gradient with respect to x alone: g W on the quantized bytes, beside torch's bf16 matmul and bitsandbytes.

python bench/grad_input.py [--shape N,K ...] [--m M ...]

Every contestant runs its own autograd; the graphs are built before the race.
"""

from __future__ import annotations

import peers
import torch
from harness import Call
from session import Session, parse
from torch import Tensor, nn

import nybble


def backward(layers: list[nn.Module], x: Tensor, g: Tensor, *wanted: str) -> Call:
    """Backward through one layer after the other: to x, and to the parameters of these names."""
    graphs = []
    for layer in layers:
        leaf = x.detach().clone().requires_grad_()
        leaves = [leaf, *(parameter for name, parameter in layer.named_parameters() if name in wanted)]
        graphs.append((leaves, layer(leaf)))

    def call(turn: int) -> object:
        leaves, y = graphs[turn % len(graphs)]
        return torch.autograd.grad(y, leaves, g, retain_graph=True)

    return call


def check(call: Call, dense: Tensor, g: Tensor) -> None:
    """Fails unless the call gives g W."""
    expected = g.float() @ dense.float()
    error = ((call(0)[0].float() - expected).norm() / expected.norm()).item()
    if not error < 0.01:
        raise peers.Missing(f"relative error of the gradient is {error:.3g}")


def main() -> None:
    args = parse(__doc__, (1, 16, 64, 256, 1024))
    session = Session("grad_input", args)
    for n, k in args.shapes:
        weight = torch.randn(n, k, dtype=torch.bfloat16) * 0.02
        ours, base = peers.quantized(weight), peers.plain(weight)
        built = {
            "nybble": (peers.copies(ours, ours.quant_tensor().nbytes, args.rotation), ours.dequantize()),
            "torch bf16": (peers.copies(base, weight.nbytes, args.rotation), weight),
        }
        try:
            theirs = peers.bitsandbytes_linear(weight).train()
            dense = peers.bitsandbytes_package().functional.dequantize_4bit(theirs.weight, theirs.weight.quant_state)
            built["bitsandbytes NF4"] = (peers.copies(theirs, weight.numel() // 2, args.rotation), dense)
        except peers.Missing as reason:
            session.note(str(reason))
        for m in args.rows:
            x, g = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(m, n, dtype=torch.bfloat16)
            contestants = {}
            for name, (layers, dense) in built.items():
                contestants[name] = backward(layers, x, g)
                check(contestants[name], dense, g)
            session.case(
                f"{n} x {k}",
                f"M = {m}",
                contestants,
                reads=ours.quant_tensor().nbytes,
                operations=2.0 * m * n * k,
                multiply="bf16",
                n=n,
                k=k,
                m=m,
                kernel=nybble.explain((n, k), m=m, grad_input=True).kernel,
            )
    session.finish()


if __name__ == "__main__":
    main()
