"""Forward without gradient, NF4 block 64 double-quantized, bf16 activations, beside every peer and both ceilings.

python bench/forward.py [--shape N,K ...] [--m M ...] [--rotation MB] [--only NAME,...]
"""

from __future__ import annotations

import peers
import torch
from runtimes import onnxruntime_layers, openvino_layers
from session import Session, parse

import nybble

CONTESTANTS = {
    "nybble": peers.nybble_layers(),
    "torch bf16": peers.torch_plain(torch.bfloat16),
    "torch int4pack": peers.torch_int4pack,
    "bitsandbytes NF4": peers.bitsandbytes_nf4,
    "onnxruntime int4, int8 activations": onnxruntime_layers(4, 4),
    "onnxruntime int4, fp32": onnxruntime_layers(4, 0),
    "OpenVINO int4, int8 activations": openvino_layers("u4"),
    "OpenVINO NF4": openvino_layers("nf4"),
}


def main() -> None:
    args = parse(__doc__, (1, 4, 8, 16, 64, 256, 1024))
    session = Session("forward", args)
    for n, k in args.shapes:
        weight = torch.randn(n, k, dtype=torch.bfloat16) * 0.02
        built = session.build(CONTESTANTS, weight)
        size = nybble.QuantTensor.quantize(weight).nbytes
        for m in args.rows:
            x = torch.randn(m, k, dtype=torch.bfloat16)
            kernel = nybble.explain((n, k), m=m).kernel
            session.case(
                f"{n} x {k}",
                f"M = {m}",
                session.bind(built, x),
                reads=size,
                operations=2.0 * m * n * k,
                multiply="bf16",
                n=n,
                k=k,
                m=m,
                kernel=kernel,
            )
    session.finish()


if __name__ == "__main__":
    main()
