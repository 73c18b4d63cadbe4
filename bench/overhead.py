"""What one call costs before any arithmetic: a 64 x 64 layer at M = 1, microseconds a call.

python bench/overhead.py

A timed call is a loop of 200, so that the clock costs nothing; "grad" means that x needs a gradient.
"""

from __future__ import annotations

import peers
import torch
from harness import Call
from session import Session, parse
from torch import Tensor, nn
from train import peft_layers, with_lora

SIZE, CALLS = 64, 200


def repeated(layer: nn.Module, x: Tensor, grad: bool) -> Call:
    """CALLS calls of one layer."""
    x = x.detach().clone().requires_grad_(grad)

    def call(turn: int) -> object:
        with torch.set_grad_enabled(grad):
            for _ in range(CALLS):
                layer(x)

    return call


def layers_of(dtype: torch.dtype, session: Session) -> dict[str, nn.Module]:
    """The layers by name."""
    weight = torch.randn(SIZE, SIZE, dtype=dtype) * 0.02
    layers = {"nybble": peers.quantized(weight), "nn.Linear": peers.plain(weight)}
    layers["nybble LoRA"] = with_lora([peers.quantized(weight)])[0]
    try:
        layers["bitsandbytes train"] = peers.bitsandbytes_linear(weight).train()
        layers["PEFT on bitsandbytes"] = peft_layers([peers.bitsandbytes_linear(weight).train()])[0]
    except peers.Missing as reason:
        session.note(str(reason))
    return layers


def main() -> None:
    args = parse(__doc__)
    session = Session("overhead", args)
    for dtype in (torch.bfloat16, torch.float32):
        layers = layers_of(dtype, session)
        x = torch.randn(1, SIZE, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        for grad in (False, True):
            contestants = {label: repeated(layer, x, grad) for label, layer in layers.items()}
            column = f"{name}, {'grad' if grad else 'no_grad'}"
            session.case(f"{SIZE} x {SIZE}, M = 1", column, contestants, repeats=CALLS)
    session.finish(unit="us")


if __name__ == "__main__":
    main()
