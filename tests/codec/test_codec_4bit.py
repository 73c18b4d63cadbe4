"""Properties of the 4-bit codec: what every backend does for every input."""

from __future__ import annotations

import math

import pytest
import torch
from codec.equality import assert_same_bits, bits
from codec.strategies import DTYPES, LAYOUTS, block_sizes, codebooks, dtypes, named_codebooks, weight, weights
from hypothesis import example, given
from hypothesis import strategies as st

from nybble import reference
from nybble.backends import cpu
from nybble.formats import BLOCK_SIZES, codebook


@given(x=weights(), codes=codebooks, block_size=block_sizes)
@example(x=torch.zeros(0), codes=codebook("nf4"), block_size=64)
@example(x=torch.tensor(0.25), codes=codebook("fp4"), block_size=32)
def test_compiled_codes_and_scales_are_the_references_bit_for_bit(isa, x, codes, block_size):
    packed, absmax = cpu.quantize_4bit(x, codes, block_size)
    expected_packed, expected_absmax = reference.quantize_4bit(x, codes, block_size)
    assert_same_bits(absmax, expected_absmax, "absmax")
    assert_same_bits(packed, expected_packed, "packed")


@given(
    n=st.one_of(st.sampled_from((0, 1, 2, 3, 63, 64, 65, 1025)), st.integers(0, 3000)),
    seed=st.integers(0, 2**31 - 1),
    codes=codebooks,
    block_size=block_sizes,
    dtype=dtypes,
)
def test_compiled_dequantization_is_the_references_for_any_bytes(isa, n, seed, codes, block_size, dtype):
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (math.ceil(n / 2), 1), generator=generator, dtype=torch.uint8)
    blocks = math.ceil(n / block_size)
    absmax = torch.randn(blocks, generator=generator).abs() * torch.pow(
        10.0, torch.rand(blocks, generator=generator) * 72 - 36
    )
    actual = cpu.dequantize_4bit(packed, absmax, codes, block_size, (n,), dtype)
    assert_same_bits(actual, reference.dequantize_4bit(packed, absmax, codes, block_size, (n,), dtype))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("fmt", ["nf4", "fp4", "int4"])
def test_every_block_size_over_several_blocks(isa, fmt, block_size):
    for dtype in DTYPES:
        x = weight("normal", 3 * block_size + block_size // 2 + 1, block_size, dtype)
        for actual, expected in zip(
            cpu.quantize_4bit(x, codebook(fmt), block_size),
            reference.quantize_4bit(x, codebook(fmt), block_size),
            strict=True,
        ):
            assert_same_bits(actual, expected)


def rounding_allowance(absmax):
    """What rounding may add to the error of one element, in fp32 with unit roundoff u = 2**-24.

    The reciprocal, its product with x, the midpoint and the product of code and scale are each off by at most u
    relative (4 u absmax in all); above 2**126 the reciprocal is denormal and off by 2**-22; below 2**-126 the product
    is denormal and off by 2**-150.
    """
    return absmax.double() * 2.0**-21 + 2.0**-149


def half_intervals(codes):
    """Per code of an ascending codebook, the farthest that a scaled value in [-1, 1] which picks it can lie away."""
    codes = codes.double()
    between = (codes[1:] - codes[:-1]) / 2
    below = torch.cat([(codes[:1] + 1).clamp(min=0), between])
    above = torch.cat([between, (1 - codes[-1:]).clamp(min=0)])
    return torch.maximum(below, above)


@given(x=weights(), codes=codebooks, block_size=block_sizes)
def test_error_is_at_most_half_the_code_interval_times_absmax(codec, x, codes, block_size):
    packed, absmax = codec.quantize_4bit(x, codes, block_size)
    y = codec.dequantize_4bit(packed, absmax, codes, block_size, x.shape, torch.float32)
    order = codes.argsort(stable=True)
    bound_of_code = torch.empty(16, dtype=torch.float64)
    bound_of_code[order] = half_intervals(codes[order])
    nibbles = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), dim=1).reshape(-1)[: x.numel()].long()
    scale = absmax.repeat_interleave(block_size)[: x.numel()]
    bound = bound_of_code[nibbles] * scale.double() + rounding_allowance(scale)
    error = (x.reshape(-1).double() - y.reshape(-1).double()).abs()
    # A user's codes beyond +-1 leave fp32's range for the very largest scales; there is no bound to hold then.
    representable = torch.isfinite(y.reshape(-1))
    assert bool((error <= bound)[representable].all())


@given(x=weights(), block_size=block_sizes)
def test_absmax_is_the_largest_magnitude_of_each_block_and_at_least_1e_38(codec, x, block_size):
    _, absmax = codec.quantize_4bit(x, codebook("nf4"), block_size)
    flat = x.float().reshape(-1)
    expected = [max(flat[i : i + block_size].abs().max().item(), 1e-38) for i in range(0, flat.numel(), block_size)]
    assert_same_bits(absmax, torch.tensor(expected, dtype=torch.float32))


@given(x=weights(), codes=named_codebooks, block_size=block_sizes)
def test_zero_stays_zero(codec, x, codes, block_size):
    packed, absmax = codec.quantize_4bit(x, codes, block_size)
    y = codec.dequantize_4bit(packed, absmax, codes, block_size, x.shape, torch.float32)
    assert bool((y[x == 0] == 0).all())


@given(x=weights(), codes=named_codebooks, block_size=block_sizes)
def test_requantizing_a_dequantized_tensor_changes_nothing(codec, x, codes, block_size):
    # Where a codebook holds +-1, the largest magnitude of a block comes back as itself: the scale is the same, and
    # every value lies at its code, far from a midpoint. Values are compared, not codes: FP4 has two codes for 0.
    packed, absmax = codec.quantize_4bit(x, codes, block_size)
    y = codec.dequantize_4bit(packed, absmax, codes, block_size, x.shape, torch.float32)
    packed_again, absmax_again = codec.quantize_4bit(y, codes, block_size)
    z = codec.dequantize_4bit(packed_again, absmax_again, codes, block_size, x.shape, torch.float32)
    assert_same_bits(absmax_again, absmax)
    assert torch.equal(z, y)
    if bool((codes[1:] > codes[:-1]).all()):
        assert_same_bits(packed_again, packed)


@pytest.mark.parametrize("n", [1, 33, 65, 127])
@pytest.mark.parametrize(("fmt", "code_of_zero"), [("nf4", 7), ("fp4", 0), ("int4", 8)])
def test_pad_nibble_of_an_odd_tensor_is_the_code_of_zero(codec, n, fmt, code_of_zero):
    packed, _ = codec.quantize_4bit(torch.full((n,), -1.0), codebook(fmt), 64)
    assert packed.shape == ((n + 1) // 2, 1)
    assert int(packed[-1]) & 15 == code_of_zero


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(codec, layout, dtype):
    from codec.strategies import _strided

    x = _strided(weight("normal", 3 * 9 * 35 + 1, 5, dtype), 9, 35, layout)
    packed, absmax = codec.quantize_4bit(x, codebook("nf4"), 32)
    expected_packed, expected_absmax = codec.quantize_4bit(
        x.clone(memory_format=torch.contiguous_format), codebook("nf4"), 32
    )
    assert_same_bits(packed, expected_packed)
    assert_same_bits(absmax, expected_absmax)
    # Packed bytes and scales may themselves be views.
    spread_packed, spread_absmax = packed.repeat_interleave(2, 1)[:, ::2], absmax.repeat_interleave(3)[::3]
    shape = tuple(x.shape)
    y = codec.dequantize_4bit(spread_packed, spread_absmax, codebook("nf4"), 32, shape, dtype)
    assert_same_bits(y, codec.dequantize_4bit(packed, absmax, codebook("nf4"), 32, shape, dtype))


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_count_does_not_change_a_bit(isa, threads, dtype, search):
    n = 300_001 if search == "absmax" else 150_001
    x = weight("normal", n, 11, dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        packed, absmax = cpu.quantize_4bit(x, codebook("nf4"), 64, search)
        results.append((packed, absmax, cpu.dequantize_4bit(packed, absmax, codebook("nf4"), 64, (n,), dtype)))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_same_bits(actual, expected)
    if search == "absmax":
        assert_same_bits(results[0][0], reference.quantize_4bit(x, codebook("nf4"), 64)[0])


def test_the_input_is_left_alone(codec):
    x = weight("normal", 200, 3)
    before = x.clone()
    codec.quantize_4bit(x, codebook("nf4"), 64, "mse")
    assert_same_bits(x, before)


def test_all_zero_one_element_and_empty(codec):
    nf4 = codebook("nf4")
    packed, absmax = codec.quantize_4bit(torch.zeros(0, 5), nf4, 64)
    assert packed.shape == (0, 1)
    assert absmax.shape == (0,)
    assert codec.dequantize_4bit(packed, absmax, nf4, 64, (0, 5), torch.bfloat16).shape == (0, 5)
    packed, absmax = codec.quantize_4bit(torch.tensor([-3.0]), nf4, 64)
    assert packed.tolist() == [[0x07]]
    assert absmax.tolist() == [3.0]
    packed, absmax = codec.quantize_4bit(torch.zeros(64), nf4, 64)
    assert packed.unique().tolist() == [0x77]
    assert bits(absmax).tolist() == bits(torch.tensor([1e-38])).tolist()
