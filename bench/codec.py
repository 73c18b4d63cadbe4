"""Quantize and dequantize, NF4 block 64, bf16, beside bitsandbytes and a copy that writes as much.

python bench/codec.py [--shape N,K ...]

Sources are rotated, for each contestant from another place on. A contestant writes into one buffer of its own again and
again.
"""

from __future__ import annotations

import inspect

import peers
import torch
from harness import Call, copies_for
from session import Session, parse
from torch import Tensor

import nybble

DEQUANTIZES_INTO = "out" in inspect.signature(nybble.QuantTensor.dequantize).parameters


def quantizers(sources: list[Tensor], session: Session) -> dict[str, Call]:
    """bf16 to NF4, with fp32 scales and with double-quantized ones."""
    single = nybble.QuantConfig(double_quant=False)
    searched = nybble.QuantConfig(double_quant=False, search="mse")

    def ours(config: nybble.QuantConfig, place: int) -> Call:
        return lambda turn: nybble.QuantTensor.quantize(sources[(turn + place) % len(sources)], config)

    calls = {
        "nybble": ours(single, 0),
        "nybble, double_quant": ours(nybble.QuantConfig(), 3),
        'nybble, search="mse"': ours(searched, 6),
    }
    try:
        quantize = peers.bitsandbytes_package().functional.quantize_4bit
    except peers.Missing as reason:
        session.note(str(reason))
        return calls

    def theirs(nested: bool, place: int) -> Call:
        return lambda turn: quantize(
            sources[(turn + place) % len(sources)], blocksize=peers.GROUP, compress_statistics=nested, quant_type="nf4"
        )

    packed, _ = theirs(False, 0)(0)
    if not torch.equal(packed, calls["nybble"](0).packed):
        session.note("bitsandbytes gives other bytes than nybble")
    return {**calls, "bitsandbytes": theirs(False, 9), "bitsandbytes, double_quant": theirs(True, 12)}


def dequantizers(sources: list[Tensor], session: Session) -> dict[str, Call]:
    """NF4 to bf16 in a given buffer."""
    calls: dict[str, Call] = {}
    packed = [nybble.QuantTensor.quantize(source) for source in sources]
    flat = [nybble.QuantTensor.quantize(source, nybble.QuantConfig(double_quant=False)) for source in sources]
    buffers = [torch.empty_like(sources[0]) for _ in range(3)]
    if DEQUANTIZES_INTO:
        calls["nybble"] = lambda turn: packed[turn % len(packed)].dequantize(out=buffers[0])
        calls["nybble, fp32 scales"] = lambda turn: flat[turn % len(flat)].dequantize(out=buffers[1])
    else:
        session.note("QuantTensor.dequantize takes no buffer yet: the raced one allocates its result")
        calls["nybble, allocating"] = lambda turn: packed[turn % len(packed)].dequantize()
    calls["copy_"] = lambda turn: buffers[2].copy_(sources[turn % len(sources)])
    try:
        functional = peers.bitsandbytes_package().functional
    except peers.Missing as reason:
        session.note(str(reason))
        return calls
    states = [
        functional.quantize_4bit(source, blocksize=peers.GROUP, compress_statistics=False, quant_type="nf4")
        for source in sources
    ]
    # Its CPU path takes no buffer.
    calls["bitsandbytes, fp32 scales, allocating"] = lambda turn: functional.dequantize_4bit(
        *states[turn % len(states)]
    )
    return calls


def main() -> None:
    args = parse(__doc__)
    session = Session("codec", args)
    for n, k in args.shapes:
        base = torch.randn(n, k, dtype=torch.bfloat16) * 0.02
        sources = [base.clone() for _ in range(copies_for(base.nbytes, 2 * args.rotation))]
        facts = {"n": n, "k": k, "source_bytes": base.nbytes}
        session.case("quantize", f"{n} x {k}", quantizers(sources, session), what="quantize", **facts)
        session.case("dequantize", f"{n} x {k}", dequantizers(sources, session), what="dequantize", **facts)
    session.finish()


if __name__ == "__main__":
    main()
