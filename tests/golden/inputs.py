"""The inputs of the golden cases, from integer arithmetic alone: the same bits on every machine and library version."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Recorded4bit:
    """What bitsandbytes made of one 4-bit case; CRC-32 of the input and of the values dequantized to each dtype."""

    packed: Tensor
    absmax: Tensor
    input_crc: int
    dequantized_crc: dict[torch.dtype, int]


def crc(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def load() -> dict[str, Tensor]:
    """The recorded arrays by key, as tensors."""
    with np.load(Path(__file__).with_name("golden.npz"), allow_pickle=False) as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def load_4bit() -> dict[str, Recorded4bit]:
    """The recorded 4-bit cases by name: the arrays hold them one after another in the order of `cases_4bit`."""
    recorded, at_byte, at_scale, result = load(), 0, 0, {}
    for i, (name, (_, block_size, _, x)) in enumerate(cases_4bit().items()):
        n_bytes, n_scales = -(-x.numel() // 2), -(-x.numel() // block_size)
        input_crc, *others = (int(value) for value in recorded["4bit/crc"][i])
        result[name] = Recorded4bit(
            recorded["4bit/packed"][at_byte : at_byte + n_bytes],
            recorded["4bit/absmax"][at_scale : at_scale + n_scales],
            input_crc,
            dict(zip(DTYPES.values(), others, strict=True)),
        )
        at_byte, at_scale = at_byte + n_bytes, at_scale + n_scales
    return result


def bell(n: int, seed: int) -> Tensor:
    """n fp32 values, bell-shaped, standard deviation about 0.6: the mean of four 24-bit integers, all steps exact."""
    state = np.arange(1, 4 * n + 1, dtype=np.uint64) + np.uint64(seed * 1_000_003)
    with np.errstate(over="ignore"):  # splitmix64: wrapping is its point
        state = state * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    uniform = (state >> np.uint64(40)).astype(np.int64) - (1 << 23)
    total = uniform.reshape(n, 4).sum(axis=1)
    return torch.from_numpy((total / 2.0**24).astype(np.float32))


def scaled(n: int, seed: int, block_size: int) -> Tensor:
    """`bell` with another power-of-two magnitude in every block and 1.5 in the last element's block.

    A partial last block has a power of two as its largest magnitude, so that dividing by it and multiplying by its
    reciprocal agree: the recorded package divides there, the rule multiplies.
    """
    x = bell(n, seed)
    block = torch.arange(n) // block_size
    x = x * torch.pow(2.0, ((block * 7) % 11 - 5).float())
    if n % block_size:
        start = n - n % block_size
        x[start:] = bell(n - start, seed + 1).clamp(-1.9, 1.9)
        x[start] = -2.0
    return x


def midpoints(codebook: Tensor, absmax: float, block_size: int) -> Tensor:
    """A few blocks with largest magnitude `absmax` whose other values are the midpoints times it, and 1 ulp beside."""
    ascending = codebook.sort(stable=True).values
    mids = (ascending[1:] + ascending[:-1]) / 2 * absmax
    infinity = torch.full_like(mids, torch.inf)
    near = torch.cat([mids, torch.nextafter(mids, infinity), torch.nextafter(mids, -infinity)])
    per_block = block_size - 1
    near = torch.cat([near, near[: -len(near) % per_block]]).reshape(-1, per_block)
    return torch.cat([torch.full((len(near), 1), absmax), near], dim=1).reshape(-1)


def signed_zeros() -> Tensor:
    """One block of 64: zeros of both signs and magnitudes around FP4's smallest code, in both signs."""
    x = torch.zeros(64)
    x[0] = 1.0
    tiny = torch.tensor([0.0, 1e-45, 1e-30, 1e-8, 0.0026, 0.002604, 0.0026041668, 0.0053, 0.08, 0.0859375])
    x[1 : 1 + len(tiny)] = tiny
    x[20 : 20 + len(tiny)] = -tiny
    return x


def division_sensitive() -> Tensor:
    """A partial block of 33 fp32 values in which dividing by the scale gives other NF4 codes than the reciprocal."""
    from nybble.formats import codebook

    return midpoints(codebook("nf4"), 0.70548, 64)[:33]


def cases_4bit() -> dict[str, tuple[str, int, str, Tensor]]:
    """Name -> (format, block size, dtype, flat input)."""
    from nybble.formats import codebook

    result = {}
    dtypes = list(DTYPES)
    for f, fmt in enumerate(("nf4", "fp4")):
        for b, block_size in enumerate((32, 64, 128, 256, 512, 1024, 2048, 4096)):
            dtype = dtypes[(b + f) % 3]
            n = max(block_size + 77, 600 + b)
            values = scaled(n, seed=b + 100 * f, block_size=block_size).to(DTYPES[dtype])
            result[f"{fmt}_{block_size}_{dtype}_{n}"] = (fmt, block_size, dtype, values)
        for dtype, n in (("fp32", 1), ("bf16", 2), ("fp16", 31), ("fp32", 65)):
            result[f"{fmt}_64_{dtype}_{n}"] = (fmt, 64, dtype, scaled(n, n, 64).to(DTYPES[dtype]))
        for tag, absmax in (("exact", 0.5), ("rounded", 0.7310586)):
            result[f"{fmt}_midpoints_{tag}"] = (fmt, 64, "fp32", midpoints(codebook(fmt), absmax, 64))
        result[f"{fmt}_signed_zeros"] = (fmt, 64, "fp32", signed_zeros())
    return result


def cases_nested() -> dict[str, Tensor]:
    """Name -> scales to double-quantize (positive fp32): one, a part of a block, one block, several with a partial."""
    return {f"nested_{n}": bell(n, seed=n).abs() * 0.05 + 0.02 for n in (2, 100, 256, 700)}


def cases_8bit() -> dict[str, tuple[bool, int, str, Tensor]]:
    """Name -> (signed map?, block size, dtype, flat input); zeros among the values."""
    result = {}
    for block_size, dtype, signed, n in ((64, "fp32", True, 321), (256, "bf16", True, 700), (256, "fp32", False, 512)):
        x = scaled(n, seed=n, block_size=block_size)
        x[5:9] = 0.0
        x = x if signed else x.square()
        result[f"8bit_{'signed' if signed else 'unsigned'}_{block_size}_{dtype}"] = (
            signed,
            block_size,
            dtype,
            x.to(DTYPES[dtype]),
        )
    return result


def cases_int8() -> dict[str, Tensor]:
    """Name -> weight [N, K]."""
    return {
        f"int8_{dtype}_{n}x{k}": (bell(n * k, seed=n) * (1 + torch.arange(n * k) // k)).reshape(n, k).to(DTYPES[dtype])
        for dtype, n, k in (("fp32", 5, 33), ("fp16", 3, 64), ("bf16", 7, 17))
    }
