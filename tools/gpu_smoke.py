"""Whether the build that is to be checked is the one that is imported, and whether one kernel of it runs."""

from __future__ import annotations

import sys

import torch

import nybble
from nybble.backends import cuda


def main(prefix: str, gpu: bool) -> int:
    print(f"nybble {nybble.__version__} from {nybble.__file__}")
    if prefix and not nybble.__file__.startswith(prefix):
        print(f"another nybble is installed: this one is not from {prefix}")
        return 1
    print(f"kernels: {cuda.core().kernel_names()}")
    if not gpu:
        return 0
    if not torch.cuda.is_available():
        print("torch finds no GPU")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := cuda.missing(device):
        print(reason)
        return 1
    layer = nybble.QuantLinear.from_linear(torch.nn.Linear(256, 128, device=device, dtype=torch.bfloat16))
    x = torch.randn(20, 256, device=device, dtype=torch.bfloat16)
    error = ((layer(x) - torch.nn.functional.linear(x, layer.dequantize(), layer.bias)).norm() / layer(x).norm()).item()
    print(f"{torch.cuda.get_device_name(device)}: linear runs, relative error {error:.2g}")
    return 0 if error < 0.02 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2] == "yes"))
