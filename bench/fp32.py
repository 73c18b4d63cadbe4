"""fp32 activations, multiplied in fp32, beside torch's fp32 matmul; with --isa avx2, what an AVX2 machine would do.

python bench/fp32.py [--isa avx2] [--shape N,K ...] [--m M ...]

With --isa avx2, torch too should be held to AVX2: set ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and
MKL_ENABLE_INSTRUCTIONS=AVX2 before the start, as `make bench` does.
"""

from __future__ import annotations

import os

import peers
import torch
from session import Session, parse

import nybble


def main() -> None:
    args = parse(__doc__, (1, 16, 256))
    op = "avx2" if args.isa == "avx2" else "fp32"
    session = Session(op, args)
    if op == "avx2" and os.environ.get("MKL_ENABLE_INSTRUCTIONS") != "AVX2":
        session.note("torch is not held to AVX2: see --help")
    for n, k in args.shapes:
        weight = torch.randn(n, k) * 0.02
        built = session.build({"nybble": peers.nybble_layers(), "torch fp32": peers.torch_plain(torch.float32)}, weight)
        size = nybble.QuantTensor.quantize(weight).nbytes
        facts = {"reads": size, "n": n, "k": k, "multiply": "fp32"}
        for m in args.rows:
            x = torch.randn(m, k)
            calls = session.bind(built, x)
            if op == "avx2":
                calls["nybble, bf16 activations"] = built["nybble"].bind(x.bfloat16())
            session.case(f"{n} x {k}", f"M = {m}", calls, operations=2.0 * m * n * k, m=m, **facts)
    session.finish()


if __name__ == "__main__":
    main()
