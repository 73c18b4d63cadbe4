"""Rounding by second moments (round_feedback, round_descent), NF4 block 64, beside torch fp32 matmuls of as many FLOPs.

python bench/rounding.py [--shape N,K ...]

At position p of a row, K - p - 1 multiply-adds take its error to the later columns: N K^2 FLOPs in all. A sweep of
descent takes each change to all columns, 2 N K^2, and so does its first gradient. Nothing is rotated: a call takes
longer than the caches remember anything.
"""

from __future__ import annotations

import torch
from harness import Call
from session import SHAPES, Session, parse
from torch import Tensor

import nybble
from nybble.backends import cpu

BLOCK = 64


def moments(k: int) -> tuple[Tensor, Tensor]:
    """H [K, K] of inputs of which a part is common to all columns, and U with U^T U = H^-1."""
    x = torch.randn(2 * k, k) + torch.randn(2 * k, 8) @ torch.randn(8, k)
    h = x.t() @ x / x.shape[0]
    h.diagonal().add_(0.05 * h.diagonal().mean())
    return h, torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).contiguous()


def matmul(n: int, k: int, operations: float) -> Call:
    """[N, K] times [K, columns] of so many FLOPs, in one call."""
    a, b = torch.randn(n, k), torch.randn(k, round(operations / (2 * n * k)))
    out = torch.empty(n, b.shape[1])
    return lambda turn: torch.mm(a, b, out=out)


def roundings(n: int, k: int) -> dict[str, tuple[Call, int]]:
    """Each way of rounding a weight [N, K], and its FLOPs in units of N K^2."""
    codebook = nybble.formats.codebook("nf4")
    weight = torch.randn(n, k) * 0.02
    given = (weight.view(-1, BLOCK).abs().amax(1), codebook, BLOCK)
    hessian, factor = moments(k)
    codes = cpu.round_feedback(weight, factor, *given)
    return {
        "round_feedback": (lambda turn: cpu.round_feedback(weight, factor, *given), 1),
        "round_descent, a sweep": (lambda turn: cpu.round_descent(codes, weight, hessian, *given), 4),
    }


def main() -> None:
    args = parse(__doc__)
    session = Session("rounding", args)
    for n, k in args.shapes if args.shape else SHAPES[:1]:
        for what, (call, times) in roundings(n, k).items():
            operations = float(times) * n * k * k
            calls = {"nybble": call, "torch fp32 matmul": matmul(n, k, operations)}
            session.case(what, f"{n} x {k}", calls, operations=operations, multiply="fp32", n=n, k=k, what=what)
    session.finish()


if __name__ == "__main__":
    main()
