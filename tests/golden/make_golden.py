"""Records what bitsandbytes 0.50.2 produces for the inputs of `inputs.py` (`golden.npz`, beside this file).

Run from the repository's root, with bitsandbytes 0.50.2 and nybble importable:

    python tests/golden/make_golden.py

4-bit codes and scales come from `bitsandbytes.functional.quantize_4bit` on the CPU. 8-bit codes (nested ones too)
come from its "default" backend, which compares with exact midpoints; its native CPU routine goes through a table of
65,536 steps, so about 0.2% of its codes are not the nearest. Dequantized values are recorded as CRC-32 only.

Three corners in which that package does not follow its own rule are recorded under "corner_*" and not compared:
a whole block of zeros stores the scale 0 (a partial one stores 1e-38); a partial last block divides by its scale
instead of multiplying by the reciprocal; the native 8-bit routine turns exact zeros into its lowest positive code.
For all other cases the script checks that division and reciprocal agree before it writes anything.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import bitsandbytes.functional as bnb
import inputs
from bitsandbytes.backends.default import ops as default_ops

VERSION = "0.50.2"


def default_backend(op, *args):
    """An operator through bitsandbytes' "default" backend, whatever the device's own kernel is."""
    return op.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)


def check_division_agrees(x: torch.Tensor, code: torch.Tensor, block_size: int) -> None:
    """Fails if the partial last block's codes depend on dividing against multiplying by the reciprocal."""
    start = x.numel() - x.numel() % block_size
    tail = x.reshape(-1)[start:].float()
    if tail.numel():
        absmax = tail.abs().max().clamp(min=1e-38)
        ascending = code.sort(stable=True).values
        bounds = (ascending[1:] + ascending[:-1]) / 2
        assert torch.equal(torch.bucketize(tail / absmax, bounds), torch.bucketize(tail * (1 / absmax), bounds))


def record_4bit(out: dict[str, np.ndarray]) -> None:
    dequantize = getattr(default_ops._dequantize_4bit_compute, "__wrapped__", default_ops._dequantize_4bit_compute)
    packed_bytes, scales, checksums = [], [], []
    for fmt, block_size, _, x in inputs.cases_4bit().values():
        code = bnb.get_4bit_type(fmt, device="cpu")
        check_division_agrees(x, code, block_size)
        packed, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type=fmt)
        values = [
            dequantize(packed.reshape(-1), state.absmax, code, block_size, x.shape, dtype)
            for dtype in inputs.DTYPES.values()
        ]
        packed_bytes.append(packed.reshape(-1).numpy())
        scales.append(state.absmax.numpy())
        checksums.append([inputs.crc(tensor) for tensor in (x, *values)])
    # One array for all cases: a zip member costs more than most cases hold.
    out["4bit/packed"], out["4bit/absmax"] = np.concatenate(packed_bytes), np.concatenate(scales)
    out["4bit/crc"] = np.array(checksums, dtype=np.uint32)
    for fmt in ("nf4", "fp4"):
        out[f"map_{fmt}"] = bnb.get_4bit_type(fmt, device="cpu").numpy()


def record_8bit(out: dict[str, np.ndarray]) -> None:
    for name, absmax in inputs.cases_nested().items():
        code = bnb.create_dynamic_map(signed=True)
        offset = absmax.mean()
        check_division_agrees(absmax - offset, code, 256)
        q, nested = default_backend(torch.ops.bitsandbytes.quantize_blockwise, absmax - offset, code, 256)
        out[f"{name}/input_crc"] = np.array(inputs.crc(absmax), dtype=np.uint32)
        out[f"{name}/q"], out[f"{name}/nested_absmax"], out[f"{name}/offset"] = (
            q.numpy(),
            nested.numpy(),
            offset.numpy(),
        )
    for name, (signed, block_size, _, x) in inputs.cases_8bit().items():
        code = bnb.create_dynamic_map(signed=signed)
        check_division_agrees(x, code, block_size)
        q, absmax = default_backend(torch.ops.bitsandbytes.quantize_blockwise, x, code, block_size)
        out[f"{name}/input_crc"] = np.array(inputs.crc(x), dtype=np.uint32)
        out[f"{name}/q"], out[f"{name}/absmax"] = q.numpy(), absmax.numpy()


def record_int8(out: dict[str, np.ndarray]) -> None:
    for name, x in inputs.cases_int8().items():
        q, scb, _ = bnb.int8_vectorwise_quant(x.half())
        out[f"{name}/input_crc"] = np.array(inputs.crc(x), dtype=np.uint32)
        out[f"{name}/q"], out[f"{name}/scb"] = q.numpy(), scb.numpy()


def record_corners(out: dict[str, np.ndarray]) -> None:
    out["corner_zero_block/absmax"] = bnb.quantize_4bit(torch.zeros(96), blocksize=64, quant_type="nf4")[
        1
    ].absmax.numpy()
    out["corner_partial_division/packed"] = (
        bnb.quantize_4bit(inputs.division_sensitive(), blocksize=64, quant_type="nf4")[0].reshape(-1).numpy()
    )
    x = inputs.bell(256, 1)
    x[3] = 0.0
    q, state = bnb.quantize_blockwise(x, blocksize=256)
    out["corner_8bit_zero/value"] = (state.code[q[3].long()]).numpy()


def main() -> None:
    if version("bitsandbytes") != VERSION:
        sys.exit(f"bitsandbytes {VERSION} is needed, found {version('bitsandbytes')}")
    torch.set_num_threads(1)
    out: dict[str, np.ndarray] = {}
    record_4bit(out)
    record_8bit(out)
    record_int8(out)
    record_corners(out)
    path = Path(__file__).with_name("golden.npz")
    np.savez_compressed(path, **out)
    print(f"{path.name}: {len(out)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
