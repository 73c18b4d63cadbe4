"""What training costs beside inference: forward with a graph, and the LoRA side path, forward and backward.

python bench/train.py [--shape N,K ...] [--m M ...]

"eval" runs without gradient, "train" on an x that needs one. LoRA: rank 16, fp32 factors, as `from_base` makes them.
"""

from __future__ import annotations

import peers
import torch
from grad_input import backward
from harness import Call
from session import Session, parse
from torch import Tensor, nn

import nybble

RANK = 16
LORA_ROWS = (256, 1024)


def training(layers: list[nn.Module], x: Tensor) -> Call:
    """Forward of an x that needs a gradient."""
    leaf = x.detach().clone().requires_grad_()
    return lambda turn: layers[turn % len(layers)](leaf)


def with_lora(layers: list[nn.Module]) -> list[nn.Module]:
    """A LoRALinear over each, B no longer zero."""
    result = []
    for layer in layers:
        lora = nybble.LoRALinear.from_base(layer, r=RANK, alpha=2 * RANK)
        nn.init.normal_(lora.lora_B, std=0.02)
        result.append(lora)
    return result


def peft_layers(layers: list[nn.Module]) -> list[nn.Module]:
    """PEFT's LoRA layer over each of bitsandbytes' layers."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora.bnb import Linear4bit
    except ImportError as error:
        raise peers.Missing("peft is not installed") from error
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, init_lora_weights=False)
    return [Linear4bit(layer, "default", config, r=RANK, lora_alpha=2 * RANK) for layer in layers]


def peft_names(layer: nn.Module) -> list[str]:
    """The trained parameters' names."""
    return [name for name, parameter in layer.named_parameters() if parameter.requires_grad]


def main() -> None:
    args = parse(__doc__, (1, 16, 256, 1024))
    session = Session("train", args)
    for n, k in args.shapes:
        weight = torch.randn(n, k, dtype=torch.bfloat16) * 0.02
        base = peers.quantized(weight)
        ours = peers.copies(base, base.quant_tensor().nbytes, args.rotation)
        plain = peers.copies(peers.plain(weight), weight.nbytes, args.rotation)
        lora = with_lora(ours)
        theirs: list[nn.Module] = []
        their_lora: list[nn.Module] = []
        try:
            layer = peers.bitsandbytes_linear(weight).train()
            theirs = peers.copies(layer, weight.numel() // 2, args.rotation)
            their_lora = peft_layers(theirs)
        except peers.Missing as reason:
            session.note(str(reason))
        facts = {"n": n, "k": k, "operations": 0.0, "reads": 0}
        for m in args.rows:
            x = torch.randn(m, k, dtype=torch.bfloat16)
            race = {"nybble train": training(ours, x), "nybble eval": peers.modules(ours)(x)}
            race["torch bf16 train"] = training(plain, x)
            if theirs:
                race["bitsandbytes train"] = training(theirs, x)
            session.case(f"{n} x {k}, forward", f"M = {m}", race, m=m, what="forward", **facts)
        for m in set(LORA_ROWS) & set(args.rows):
            x, g = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(m, n, dtype=torch.bfloat16)
            race = {"nybble": training(ours, x), "nybble LoRA": training(lora, x)}
            if their_lora:
                race["PEFT on bitsandbytes"] = training(their_lora, x)
            session.case(f"{n} x {k}, LoRA forward", f"M = {m}", race, m=m, what="lora forward", **facts)
            race = {
                "nybble": backward(ours, x, g),
                "nybble LoRA, to x": backward(lora, x, g),
                "nybble LoRA, to x, A, B": backward(lora, x, g, "lora_A", "lora_B"),
            }
            if their_lora:
                race["PEFT on bitsandbytes, to x, A, B"] = backward(their_lora, x, g, *peft_names(their_lora[0]))
            session.case(f"{n} x {k}, LoRA backward", f"M = {m}", race, m=m, what="lora backward", **facts)
    session.finish()


if __name__ == "__main__":
    main()
