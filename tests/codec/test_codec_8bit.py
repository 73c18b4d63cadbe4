"""Properties of the 8-bit codecs: double quantization of scales, block-wise 8-bit, row-wise int8."""

from __future__ import annotations

import math

import pytest
import torch
from codec.equality import assert_same_bits
from codec.strategies import DTYPES, block_sizes, dtypes, weight, weights
from hypothesis import given
from hypothesis import strategies as st

from nybble import reference
from nybble.backends import cpu
from nybble.formats import dynamic_map

maps = st.sampled_from((True, False)).map(dynamic_map)
U = 2.0**-24  # unit roundoff of fp32


@given(x=weights(), code=maps, block_size=block_sizes)
def test_compiled_8bit_is_the_references_bit_for_bit(isa, x, code, block_size):
    q, absmax = cpu.quantize_8bit(x, code, block_size)
    expected_q, expected_absmax = reference.quantize_8bit(x, code, block_size)
    assert_same_bits(absmax, expected_absmax, "absmax")
    assert_same_bits(q, expected_q, "q")
    for dtype in DTYPES:
        actual = cpu.dequantize_8bit(q, absmax, code, block_size, dtype)
        assert_same_bits(actual, reference.dequantize_8bit(q, absmax, code, block_size, dtype), str(dtype))


@given(x=weights(), block_size=block_sizes)
def test_8bit_code_is_the_nearest_and_zero_stays_zero(codec, x, block_size):
    code = dynamic_map()
    q, absmax = codec.quantize_8bit(x, code, block_size)
    assert q.shape == x.shape
    y = codec.dequantize_8bit(q, absmax, code, block_size, torch.float32)
    assert bool((y[x == 0] == 0).all())
    scale = absmax.repeat_interleave(block_size)[: x.numel()].double()
    s = (x.reshape(-1).double() / scale).unsqueeze(1)
    best = (s - code.double()).abs().amin(dim=1) if x.numel() else s[:, 0]
    picked = (s[:, 0] - code.double()[q.reshape(-1).long()]).abs()
    # The reciprocal (denormal and off by 2**-22 for the largest scales), the product and the midpoint are rounded.
    assert bool((picked <= best + 2.0**-21).all())


@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_8bit_error_on_normal_values(codec, block_size):
    x = weight("normal", 1 << 18, 8)
    q, absmax = codec.quantize_8bit(x, dynamic_map(), block_size)
    error = (x - codec.dequantize_8bit(q, absmax, dynamic_map(), block_size, torch.float32)).abs()
    assert error.mean() < 0.011
    assert (error / (x.abs() + 1e-8)).mean() < 0.018


@given(
    n=st.one_of(st.sampled_from((0, 1, 2, 255, 256, 257, 512)), st.integers(0, 2000)),
    seed=st.integers(0, 2**31 - 1),
    kind=st.sampled_from(("normal", "heavy", "zeros", "grid", "magnitudes", "denormal", "largest")),
)
def test_compiled_nested_scales_are_the_references(isa, n, seed, kind):
    absmax = weight(kind, n, seed).abs().clamp(min=1e-38)
    actual, expected = cpu.nested_quantize(absmax), reference.nested_quantize(absmax)
    for got, want, what in zip(actual, expected, ("q", "nested_absmax", "offset"), strict=True):
        assert_same_bits(got, want, what)
    q, nested_absmax, offset = expected
    assert_same_bits(
        cpu.nested_dequantize(q, nested_absmax, dynamic_map(), offset),
        reference.nested_dequantize(q, nested_absmax, dynamic_map(), offset),
    )


def test_nested_scales_lie_within_half_a_step_of_the_map(codec):
    absmax = weight("normal", 5000, 2).abs() + 0.1
    q, nested_absmax, offset = codec.nested_quantize(absmax)
    decoded = codec.nested_dequantize(q, nested_absmax, dynamic_map(), offset)
    half_step = float((dynamic_map()[1:] - dynamic_map()[:-1]).max()) / 2
    scale = nested_absmax.repeat_interleave(256)[:5000]
    # Subtraction and addition of the offset, code, scale and product: at most 8 roundings of values below 2 scales.
    assert bool(((decoded - absmax).abs() <= scale * half_step + 8 * U * (scale + absmax + offset)).all())


def test_nested_offset_is_finite_for_the_largest_scales(codec):
    absmax = torch.full((300,), torch.finfo(torch.float32).max)
    q, nested_absmax, offset = codec.nested_quantize(absmax)
    assert torch.isfinite(offset)
    assert_same_bits(codec.nested_dequantize(q, nested_absmax, dynamic_map(), offset), absmax)


def test_nested_of_no_scales(codec):
    q, nested_absmax, offset = codec.nested_quantize(torch.zeros(0))
    assert (q.shape, nested_absmax.shape, offset.item()) == ((0,), (0,), 0.0)
    assert codec.nested_dequantize(q, nested_absmax, dynamic_map(), offset).shape == (0,)


@pytest.mark.parametrize("n", [32768, 32769, 100_003])
def test_nested_offset_does_not_depend_on_the_thread_count(codec, threads, n):
    absmax = weight("heavy", n, 4).abs() + 0.01
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(codec.nested_quantize(absmax))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_same_bits(actual, expected)
    exact = absmax.double().mean()
    # Above torch's serial range: the float64 mean, rounded once (its own error is far below).
    limit = U * exact if n > 32768 else 32 * U * absmax.double().abs().mean() * math.log2(n)
    assert abs(results[0][2].double() - exact) <= limit * (1 + 1e-6)


@given(
    rows=st.integers(0, 9),
    columns=st.one_of(st.integers(0, 70), st.sampled_from((127, 128, 129))),
    seed=st.integers(0, 2**31 - 1),
    kind=st.sampled_from(("normal", "zeros", "grid", "heavy", "sparse", "spike", "denormal")),
    dtype=dtypes,
    transposed=st.booleans(),
)
def test_compiled_int8_rows_are_the_references(isa, rows, columns, seed, kind, dtype, transposed):
    x = weight(kind, rows * columns, seed, dtype).clamp(-60000.0, 60000.0)
    x = x.reshape(columns, rows).t() if transposed else x.reshape(rows, columns)
    q, scb = cpu.quantize_int8(x)
    expected_q, expected_scb = reference.quantize_int8(x)
    assert_same_bits(scb, expected_scb, "scb")
    assert_same_bits(q, expected_q, "q")
    for out in DTYPES:
        assert_same_bits(cpu.dequantize_int8(q, scb, out), reference.dequantize_int8(q, scb, out), str(out))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_error_is_at_most_half_a_step_of_the_row(codec, dtype):
    x = (weight("normal", 40 * 100, 6) * torch.logspace(-3, 3, 40).repeat_interleave(100)).reshape(40, 100).to(dtype)
    x[7] = 0
    q, scb = codec.quantize_int8(x)
    half = x.half().double()
    assert_same_bits(scb, x.half().float().abs().amax(dim=1))
    assert int(q.abs().max()) == 127
    error = (codec.dequantize_int8(q, scb, torch.float32).double() - half).abs()
    # Half a step, and four roundings of values up to 127 steps.
    assert bool((error <= scb.double().unsqueeze(1) / 127 * (0.5 + 127 * 4 * U)).all())
    assert bool((error[7] == 0).all())


@pytest.mark.parametrize("rows", [1, 300])
def test_int8_thread_count_does_not_change_a_bit(isa, threads, rows):
    x = weight("normal", rows * 1000, 9).reshape(rows, 1000)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(cpu.quantize_int8(x))
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)


def test_8bit_thread_count_does_not_change_a_bit(isa, threads):
    x = weight("normal", 300_001, 9, torch.bfloat16)
    results = []
    for count in (1, 2):
        threads(count)
        q, absmax = cpu.quantize_8bit(x, dynamic_map(), 256)
        results.append((q, absmax, cpu.dequantize_8bit(q, absmax, dynamic_map(), 256, torch.bfloat16)))
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)
