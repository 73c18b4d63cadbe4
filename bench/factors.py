"""Products with LoRA's factors, bf16: nybble's kernels beside torch's products and the casts that they need.

python bench/factors.py [--seconds S]

1,024 rows of x; forward (x A^T and g B, scaled) and the gradients of A and B in fp32. Matrices rotate.
"""

from __future__ import annotations

import torch
from harness import Call, copies_for
from session import Session, parse

from nybble.backends import factors

ROWS, SCALE = 1024, 2.0
#: Columns of x, rank.
SIZES = ((1024, 16), (2816, 16), (4096, 16), (4096, 64))


def calls(columns: int, rank: int) -> dict[str, dict[str, Call]]:
    """The contestants of each table."""
    xs = [torch.randn(ROWS, columns).bfloat16() for _ in range(copies_for(2 * ROWS * columns, 64 << 20))]
    a, b, side = torch.randn(rank, columns), torch.randn(columns, rank), torch.randn(ROWS, rank).bfloat16()

    def x(turn: int) -> torch.Tensor:
        return xs[turn % len(xs)]

    return {
        "x A^T": {
            "nybble": lambda turn: factors.apply(x(turn), a, SCALE, True),
            "torch": lambda turn: torch.mm(x(turn), a.bfloat16().t()) * SCALE,
        },
        "g B": {
            "nybble": lambda turn: factors.apply(x(turn), b, SCALE, False),
            "torch": lambda turn: torch.mm(x(turn), b.bfloat16()) * SCALE,
        },
        "gradient of A": {
            "nybble": lambda turn: factors.gradient(side, x(turn), True),
            "torch": lambda turn: torch.mm(side.t(), x(turn)).float(),
        },
        "gradient of B": {
            "nybble": lambda turn: factors.gradient(side, x(turn), False),
            "torch": lambda turn: torch.mm(x(turn).t(), side).float(),
        },
    }


def main() -> None:
    session = Session("factors", parse(__doc__, seconds=1.0))
    for columns, rank in SIZES:
        for what, contestants in calls(columns, rank).items():
            operations = 2.0 * ROWS * columns * rank
            session.case(
                what, f"{columns} r={rank}", contestants, operations=operations, n=rank, k=columns, m=ROWS, what=what
            )
    session.finish()


if __name__ == "__main__":
    main()
