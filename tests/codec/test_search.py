"""`search="mse"`: another scale, the same rule for the codes, never a larger squared error on any block."""

from __future__ import annotations

import pytest
import torch
from codec.equality import assert_same_bits
from codec.strategies import block_sizes, codebooks, weight, weights
from hypothesis import given
from hypothesis import strategies as st

from nybble import reference
from nybble.errors import FormatError, LayoutError
from nybble.formats import codebook

# Relative to the block's energy: 4096 products summed in fp32 in any order, and the rounding of scales and values.
TOLERANCE = 2.0**-14


def real_elements(x, blocks):
    """Which elements of `blocks` are not padding."""
    return (torch.arange(blocks.numel()) < x.numel()).reshape(blocks.shape)


def squared_error(x, blocks, scales, codes):
    """Per block, in float64, of the values that the rule gives for these scales."""
    picked = reference.pick_codes(blocks, scales, codes)
    values = codes[picked.long()] * scales.unsqueeze(1)
    return ((blocks.double() - values.double()) * real_elements(x, blocks)).square().sum(dim=1)


def comparable(blocks, absmax, codes):
    """Blocks whose scale is not next to the stored minimum, and whose values stay within fp32 beyond codes of +-1."""
    return (absmax > 1e-36) & (absmax < torch.finfo(torch.float32).max / 4 / codes.abs().max().clamp(min=1))


def unfit(gain, rounding, scales, absmax):
    """Blocks that no candidate is better for than all zeros, which codes of one sign cannot say: they keep absmax."""
    return (gain <= rounding) & (scales == absmax)


@given(x=weights(), codes=codebooks, block_size=block_sizes)
def test_codes_follow_the_rule_for_the_stored_scale(codec, x, codes, block_size):
    packed, scales = codec.quantize_4bit(x, codes, block_size, "mse")
    picked = reference.pick_codes(reference.to_blocks(x, block_size), scales, codes).reshape(-1)
    picked = picked[: x.numel() + x.numel() % 2]
    assert_same_bits(packed, ((picked[0::2] << 4) | picked[1::2]).unsqueeze(1))
    assert bool(torch.isfinite(scales).all())
    assert bool((scales >= reference.MIN_ABSMAX).all())


@given(x=weights(), codes=codebooks, block_size=block_sizes)
def test_squared_error_is_never_above_absmaxs(codec, x, codes, block_size):
    _, scales = codec.quantize_4bit(x, codes, block_size, "mse")
    blocks = reference.to_blocks(x, block_size)
    absmax = reference.block_absmax(blocks)
    energy = blocks.double().square().sum(dim=1)
    found, plain = squared_error(x, blocks, scales, codes), squared_error(x, blocks, absmax, codes)
    ok = (found <= plain + TOLERANCE * energy) | ~comparable(blocks, absmax, codes)
    assert bool(ok.all())


@given(x=weights(), codes=codebooks, block_size=block_sizes)
def test_error_is_at_most_that_of_the_best_candidate(codec, x, codes, block_size):
    # |x|^2 - <x, c>^2 / <c, c> for every set of codes that the grid gives: the minimum, whatever breaks ties.
    _, scales = codec.quantize_4bit(x, codes, block_size, "mse")
    blocks = reference.to_blocks(x, block_size)
    absmax = reference.block_absmax(blocks)
    energy = blocks.double().square().sum(dim=1)
    gain = torch.zeros_like(energy)
    for factor in reference.MSE_FACTORS:
        c = codes[reference.pick_codes(blocks, absmax * factor, codes).long()].double() * real_elements(x, blocks)
        xc, cc = (blocks.double() * c).sum(dim=1), c.square().sum(dim=1)
        gain = torch.where((xc > 0) & (cc > 0), torch.maximum(gain, xc * xc / cc), gain)
    ok = squared_error(x, blocks, scales, codes) <= energy - gain + TOLERANCE * energy
    assert bool((ok | unfit(gain, TOLERANCE * energy, scales, absmax) | ~comparable(blocks, absmax, codes)).all())


@pytest.mark.parametrize(("block_size", "published"), [(64, 0.00725), (32, 0.00629)])
def test_mean_squared_error_on_normal_values(codec, block_size, published):
    # The published figures are for double-quantized scales, which cost nothing measurable; 2% covers 0.25 M samples.
    x = weight("normal", 1 << 18, 12)
    packed, scales = codec.quantize_4bit(x, codebook("nf4"), block_size, "mse")
    y = codec.dequantize_4bit(packed, scales, codebook("nf4"), block_size, x.shape, torch.float32)
    assert (x - y).square().mean().item() == pytest.approx(published, rel=0.02)


def test_a_block_that_no_code_fits_keeps_its_absmax(codec):
    _, scales = codec.quantize_4bit(torch.zeros(64), codebook("nf4"), 64, "mse")
    assert_same_bits(scales, torch.tensor([1e-38]))
    positive = torch.linspace(0.5, 1.0, 16)
    _, scales = codec.quantize_4bit(torch.full((64,), -2.0), positive, 64, "mse")
    assert scales.tolist() == [2.0]


@st.composite
def importances(draw):
    columns = draw(st.integers(1, 80))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    values = torch.rand(columns, generator=generator)
    return torch.where(torch.rand(columns, generator=generator) < draw(st.sampled_from((0.0, 0.3))), 0.0, values)


def weighed(x, blocks, importance):
    """How much each element of `blocks` counts; `importance` None: the square of its share of absmax."""
    real = real_elements(x, blocks).double()
    if importance is None:
        return (blocks.double() / reference.block_absmax(blocks)[:, None]).square() * real
    return importance.double()[torch.arange(blocks.numel()) % importance.numel()].view(blocks.shape) * real


@given(x=weights(), codes=codebooks, block_size=block_sizes, importance=st.none() | importances())
def test_weighed_errors_are_at_most_those_of_the_best_candidate(codec, x, codes, block_size, importance):
    search = "square" if importance is None else "importance"
    packed, scales = codec.quantize_4bit(x, codes, block_size, search, importance=importance)
    blocks = reference.to_blocks(x, block_size)
    w, absmax, d = weighed(x, blocks, importance), reference.block_absmax(blocks), blocks.double()
    energy = (w * d * d).sum(1)
    gain = torch.zeros_like(energy)
    for factor in reference.MSE_FACTORS:
        c = codes[reference.pick_codes(blocks, absmax * factor, codes).long()].double()
        xc, cc = (w * d * c).sum(1), (w * c * c).sum(1)
        gain = torch.where((xc > 0) & (cc > 0), torch.maximum(gain, xc * xc / cc), gain)
    picked = reference.pick_codes(blocks, scales, codes)
    error = (w * (d - codes[picked.long()].double() * scales[:, None]).square()).sum(1)
    # Relative to what the block has where every element counts as much as the most important: sums are fp32.
    whole = w.amax(1) * d.square().sum(1)
    ok = (error <= energy - gain + TOLERANCE * whole) | unfit(gain, TOLERANCE * whole, scales, absmax)
    ok |= ~comparable(blocks, absmax, codes)
    # Products of denormal weights and squares may leave fp32.
    assert bool((ok | (w.amax(1) < 1e-6)).all())
    flat = picked.reshape(-1)[: x.numel() + x.numel() % 2]
    assert_same_bits(packed, ((flat[0::2] << 4) | flat[1::2]).unsqueeze(1))


@given(codes=codebooks, block_size=block_sizes, seed=st.integers(0, 2**31 - 1))
def test_equal_importance_is_mse(codec, codes, block_size, seed):
    x = weight("normal", 3 * block_size, seed)  # whole blocks: the sums over a partial one take another way
    found = codec.quantize_4bit(x, codes, block_size, "importance", importance=torch.ones(7))
    assert_same_bits(found[1], codec.quantize_4bit(x, codes, block_size, "mse")[1])


def test_a_column_that_does_not_count_is_clipped(codec):
    x = weight("normal", 4 * 64, 3).clamp(-2, 2).view(4, 64)
    x[:, 5] = 8.0
    importance = torch.ones(64)
    importance[5] = 0.0
    _, scales = codec.quantize_4bit(x, codebook("nf4"), 64, "importance", importance=importance)
    assert bool((scales < 5).all())
    assert bool((codec.quantize_4bit(x, codebook("nf4"), 64, "mse")[1] > 6).all())


def test_searches_have_what_they_need(codec):
    x = torch.ones(64)
    with pytest.raises(FormatError, match="importance is missing"):
        codec.quantize_4bit(x, codebook("nf4"), 64, "importance")
    with pytest.raises(FormatError, match="importance is given"):
        codec.quantize_4bit(x, codebook("nf4"), 64, "mse", importance=torch.ones(64))
    with pytest.raises(LayoutError, match="negative or not finite"):
        codec.quantize_4bit(x, codebook("nf4"), 64, "importance", importance=-torch.ones(64))
