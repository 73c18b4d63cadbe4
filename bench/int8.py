"""int8 weights, and int8 activations where `QuantConfig(compute="int8")` is available, beside the int8 peers.

python bench/int8.py [--shape N,K ...] [--m M ...]

W8A16: int8 weights, bf16 activations. W8A8 and W4A8: activations quantized to int8, row by row, inside the call.
"""

from __future__ import annotations

import peers
import torch
from runtimes import onnxruntime_layers, openvino_layers
from session import Session, parse

CONTESTANTS = {
    "nybble W8A16": peers.nybble_layers(format="int8"),
    "nybble W8A8": peers.nybble_layers(format="int8", compute="int8"),
    "nybble W4A8": peers.nybble_layers(format="nf4", compute="int8"),
    "torch bf16": peers.torch_plain(torch.bfloat16),
    "torch int8pack (W8A16)": peers.torch_int8pack,
    "bitsandbytes int8": peers.bitsandbytes_int8,
    "onnxruntime int8": onnxruntime_layers(8, 4),
    "OpenVINO int8": openvino_layers("i8"),
    "OpenVINO int4, int8 activations": openvino_layers("u4"),
}


def main() -> None:
    args = parse(__doc__, (1, 16, 256, 1024))
    session = Session("int8", args)
    for n, k in args.shapes:
        weight = torch.randn(n, k, dtype=torch.bfloat16) * 0.02
        built = session.build(CONTESTANTS, weight)
        for m in args.rows:
            calls = session.bind(built, torch.randn(m, k, dtype=torch.bfloat16))
            session.case(
                f"{n} x {k}",
                f"M = {m}",
                calls,
                reads=n * k,
                operations=2.0 * m * n * k,
                multiply="int8",
                n=n,
                k=k,
                m=m,
            )
    session.finish()


if __name__ == "__main__":
    main()
