"""Values next to a threshold: 16-bit sources are ranked as integers, and may not fall on its other side."""

from __future__ import annotations

import pytest
import torch
from codec.equality import assert_same_bits
from codec.strategies import codebooks
from hypothesis import example, given
from hypothesis import strategies as st

from nybble import reference
from nybble.backends import cpu
from nybble.formats import codebook

# Thresholds at 0, next to 0, at and beyond +-1, infinitely close to each other.
EXTREMES = torch.tensor(
    [-3.0, -1.0, -1.0, -0.999, -0.5, -1e-30, -1e-31, 0.0, 0.0, 1e-38, 2e-38, 0.25, 0.2500001, 1.0, 1.0, 3.0]
)


def neighbours(values, dtype):
    """Each value in `dtype` with the two representable ones below and above it, finite ones only."""
    bits = values.to(dtype).view(torch.int16).to(torch.int32)
    keys = torch.where(bits < 0, -(bits & 0x7FFF), bits)
    near = (keys.unsqueeze(1) + torch.arange(-2, 3)).reshape(-1)
    near = torch.where(near < 0, near.abs() - 32768, near).to(torch.int16).view(dtype)
    return near[torch.isfinite(near)]


def around_thresholds(codes, absmax, dtype):
    """A block of values next to what `codes` separates at this absmax, `absmax` first."""
    ascending = codes.sort().values
    middles = (ascending[:-1] + ascending[1:]) / 2
    places = torch.cat([middles.clamp(-1, 1) * absmax, torch.tensor([0.0, -0.0, absmax, -absmax])])
    tiny = torch.tensor([absmax]).mul(2.0**-75).mul(2.0**-75)  # below it, x / absmax underflows to 0
    near = neighbours(torch.cat([places, tiny, -tiny]), dtype)
    near = near[near.float().abs() <= absmax]
    return torch.cat([torch.tensor([absmax], dtype=dtype), near])


@given(codes=codebooks, absmax=st.integers(0, 0x7F7F))
@example(codes=codebook("fp4"), absmax=0x7F7F)
@example(codes=codebook("fp4"), absmax=0x4800)
@example(codes=codebook("nf4"), absmax=0x0001)
@example(codes=EXTREMES, absmax=0x7F7F)
@example(codes=EXTREMES, absmax=0x3F80)
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_bf16_next_to_thresholds(isa, codes, absmax, search):
    check(codes, absmax, torch.bfloat16, search)


@given(codes=codebooks, absmax=st.integers(0, 0x7BFF))
@example(codes=codebook("fp4"), absmax=0x7BFF)
@example(codes=codebook("nf4"), absmax=0x0001)
@example(codes=codebook("nf4"), absmax=0x0400)
@example(codes=EXTREMES, absmax=0x3C00)
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_fp16_next_to_thresholds(isa, codes, absmax, search):
    check(codes, absmax, torch.float16, search)


def check(codes, absmax, dtype, search):
    largest = torch.tensor([absmax], dtype=torch.int16).view(dtype).item()
    x = around_thresholds(codes, largest, dtype)
    packed, scales = cpu.quantize_4bit(x, codes, 256, search)
    if search == "absmax":
        assert_same_bits(scales, reference.quantize_4bit(x, codes, 256)[1], "absmax")
    picked = reference.pick_codes(reference.to_blocks(x, 256), scales, codes).reshape(-1)[: x.numel() + x.numel() % 2]
    assert_same_bits(packed, ((picked[0::2] << 4) | picked[1::2]).unsqueeze(1), "packed")


@given(codes=codebooks, mantissa=st.integers(0, 2**23 - 1), exponent=st.integers(1, 254))
@example(codes=EXTREMES, mantissa=0, exponent=127)
def test_fp32_next_to_thresholds(isa, codes, mantissa, exponent):
    absmax = torch.tensor([exponent << 23 | mantissa], dtype=torch.int32).view(torch.float32)
    ascending = codes.sort().values
    middles = ((ascending[:-1] + ascending[1:]) / 2).clamp(-1, 1) * absmax
    infinity = torch.tensor(float("inf"))
    x = torch.cat([absmax, middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)])
    x = x.clamp(-absmax, absmax)
    for actual, expected in zip(cpu.quantize_4bit(x, codes, 64), reference.quantize_4bit(x, codes, 64), strict=True):
        assert_same_bits(actual, expected)
