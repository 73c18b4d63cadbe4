"""Bit equality with what bitsandbytes 0.50.2 recorded, and the corners in which it leaves its own rule."""

from __future__ import annotations

import pytest
import torch
from codec.equality import assert_same_bits
from golden import inputs

from nybble.formats import codebook, dynamic_map

RECORDED = inputs.load()
CASES_4BIT = inputs.cases_4bit()
RECORDED_4BIT = inputs.load_4bit()
CASES_8BIT = inputs.cases_8bit()
CASES_NESTED = inputs.cases_nested()
CASES_INT8 = inputs.cases_int8()


def same_input(x, crc):
    assert inputs.crc(x) == int(crc), "the input differs from the recorded one: this machine's arithmetic is at fault"


@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
def test_codebook_is_the_recorded_map(fmt):
    assert_same_bits(codebook(fmt), RECORDED[f"map_{fmt}"])


@pytest.mark.parametrize("name", CASES_4BIT)
def test_4bit_codes_and_scales(codec, name):
    fmt, block_size, _, x = CASES_4BIT[name]
    recorded = RECORDED_4BIT[name]
    same_input(x, recorded.input_crc)
    packed, absmax = codec.quantize_4bit(x, codebook(fmt), block_size)
    assert_same_bits(packed, recorded.packed.unsqueeze(1), "packed")
    assert_same_bits(absmax, recorded.absmax, "absmax")
    for dtype, crc in recorded.dequantized_crc.items():
        values = codec.dequantize_4bit(packed, absmax, codebook(fmt), block_size, x.shape, dtype)
        assert inputs.crc(values) == crc, f"dequantized to {dtype}"


@pytest.mark.parametrize("name", CASES_NESTED)
def test_nested_scales(codec, name):
    absmax = CASES_NESTED[name]
    same_input(absmax, RECORDED[f"{name}/input_crc"])
    q, nested_absmax, offset = codec.nested_quantize(absmax)
    assert_same_bits(offset, RECORDED[f"{name}/offset"], "offset")
    assert_same_bits(nested_absmax, RECORDED[f"{name}/nested_absmax"], "nested_absmax")
    assert_same_bits(q, RECORDED[f"{name}/q"], "q")


@pytest.mark.parametrize("name", CASES_8BIT)
def test_8bit_blockwise(codec, name):
    signed, block_size, _, x = CASES_8BIT[name]
    same_input(x, RECORDED[f"{name}/input_crc"])
    q, absmax = codec.quantize_8bit(x, dynamic_map(signed), block_size)
    assert_same_bits(q, RECORDED[f"{name}/q"], "q")
    assert_same_bits(absmax, RECORDED[f"{name}/absmax"], "absmax")


@pytest.mark.parametrize("name", CASES_INT8)
def test_int8_rows(codec, name):
    x = CASES_INT8[name]
    same_input(x, RECORDED[f"{name}/input_crc"])
    q, scb = codec.quantize_int8(x)
    assert_same_bits(q, RECORDED[f"{name}/q"], "q")
    assert_same_bits(scb, RECORDED[f"{name}/scb"], "scb")


# The corners: there the rule decides, and the recorded package differs.


def test_corner_whole_zero_block_stores_the_smallest_scale_like_a_partial_one(codec):
    _, absmax = codec.quantize_4bit(torch.zeros(96), codebook("nf4"), 64)
    assert_same_bits(absmax, torch.tensor([1e-38, 1e-38]))
    assert_same_bits(RECORDED["corner_zero_block/absmax"], torch.tensor([0.0, 1e-38]))


def test_corner_partial_block_multiplies_by_the_reciprocal_like_a_whole_one(codec):
    x = inputs.division_sensitive()
    partial, _ = codec.quantize_4bit(x, codebook("nf4"), 64)
    whole, _ = codec.quantize_4bit(torch.cat([x, torch.zeros(31)]), codebook("nf4"), 64)
    assert_same_bits(partial[:16], whole[:16])
    assert not torch.equal(partial.reshape(-1), RECORDED["corner_partial_division/packed"])


def test_corner_8bit_zero_stays_zero(codec):
    x = inputs.bell(256, 1)
    x[3] = 0.0
    q, _ = codec.quantize_8bit(x, dynamic_map(), 256)
    assert dynamic_map()[q[3].long()] == 0.0
    assert RECORDED["corner_8bit_zero/value"] > 0.0
