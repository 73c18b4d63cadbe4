"""Metal's codecs against the reference, bit for bit."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import CUSTOM, DTYPES, quantized, values
from shim.metal.library import Schedule
from torch import Tensor

from nybble import QuantConfig, reference
from nybble.errors import NonFiniteError
from nybble.formats import BLOCK_SIZES, codebook, dynamic_map

_CODEBOOKS = [codebook(name) for name in ("nf4", "fp4", "int4", CUSTOM)]
# Equal codes, unordered ones, and midpoints of exactly 0.
_CODEBOOKS.append(
    torch.tensor([0.5, -0.5, 0.25, -0.25, 1, -1, 0.75, -0.75, 0.5, -0.5, 0.1, -0.1, 0.9, -0.9, 0.3, -0.3])
)
_NORMAL = torch.finfo(torch.float32).tiny


@st.composite
def tensors(draw: st.DrawFn, most: int = 700) -> Tensor:
    """Any finite numbers: of one magnitude, of many, of any bits, denormal ones and the largest among them."""
    dtype = draw(st.sampled_from(DTYPES))
    n, seed = (
        draw(st.one_of(st.sampled_from((0, 1, 2, 31, 32, 33, 64, 65)), st.integers(0, most))),
        draw(st.integers(0, 2**31)),
    )
    kind = draw(st.sampled_from(("normal", "small", "magnitudes", "bits", "extremes", "zeros")))
    if kind == "zeros":
        return torch.zeros(n, dtype=dtype)
    if kind == "bits":
        bits = torch.from_numpy(np.random.default_rng(seed).integers(-(2**31), 2**31, n, dtype=np.int32))
        found = bits.view(torch.float32) if dtype == torch.float32 else (bits >> 16).to(torch.int16).view(dtype)
        return torch.where(found.isfinite(), found, torch.zeros((), dtype=dtype))
    if kind == "extremes":
        info = torch.finfo(dtype)
        some = torch.tensor(
            [
                0.0,
                -0.0,
                info.max,
                -info.max,
                info.max / 2,
                info.tiny,
                -info.tiny,
                info.smallest_normal / 4,
                info.eps,
                1.0,
            ]
        )
        return some[torch.randint(0, len(some), (n,), generator=torch.Generator().manual_seed(seed))].to(dtype)
    return values(kind, n, dtype=dtype, seed=seed)


@given(x=tensors(), codes=st.sampled_from(_CODEBOOKS), block=st.sampled_from(BLOCK_SIZES[:4]), flush=st.booleans())
def test_quantize_4bit(mps: ModuleType, schedule: Schedule, x: Tensor, codes: Tensor, block: int, flush: bool) -> None:
    schedule.flush = flush
    packed, absmax = mps.quantize_4bit(x, codes, block)
    wanted_packed, wanted_absmax = reference.quantize_4bit(x, codes, block)
    assert torch.equal(absmax.view(torch.int32), wanted_absmax.view(torch.int32))
    assert torch.equal(packed, wanted_packed)


@given(x=tensors(), signed=st.booleans(), block=st.sampled_from((32, 256)), flush=st.booleans())
def test_quantize_8bit(mps: ModuleType, schedule: Schedule, x: Tensor, signed: bool, block: int, flush: bool) -> None:
    schedule.flush = flush
    found, wanted = (module.quantize_8bit(x, dynamic_map(signed), block) for module in (mps, reference))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@given(x=tensors(), columns=st.integers(1, 80), flush=st.booleans())
def test_quantize_int8(mps: ModuleType, schedule: Schedule, x: Tensor, columns: int, flush: bool) -> None:
    limit = 65280.0 if x.dtype == torch.bfloat16 else 65504.0  # the largest in fp16
    x = x[: x.numel() // columns * columns].clamp(-limit, limit).reshape(-1, columns)
    schedule.flush = flush
    found, wanted = (module.quantize_int8(x) for module in (mps, reference))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 70)),
    format=st.sampled_from(("nf4", "fp4", "int4", CUSTOM, "int8")),
    block=st.sampled_from(BLOCK_SIZES),
    nested=st.booleans(),
    kind=st.sampled_from(("normal", "large", "small", "magnitudes")),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31 - 1),
    flush=st.booleans(),
)
def test_dequantize(
    mps: ModuleType,
    schedule: Schedule,
    shape: tuple[int, int],
    format: object,
    block: int,
    nested: bool,
    kind: str,
    dtype: torch.dtype,
    seed: int,
    flush: bool,
) -> None:
    weight = quantized(
        *shape, QuantConfig(format=format, block_size=block, double_quant=nested and format != "int8"), kind, seed
    )
    wanted = weight.dequantize(dtype)
    schedule.flush = flush
    out = torch.full(shape, 7.0, dtype=dtype)
    assert mps.dequantize(weight.packed_weight(), dtype, out=out) is out
    off = out != wanted
    if flush:  # a value or a scale below 2^-126 is 0
        off &= (out.double() - wanted.double()).abs() > 4 * _NORMAL
    assert not bool(off.any())


@given(x=tensors(), dtype=st.sampled_from(DTYPES), block=st.sampled_from((32, 256)))
def test_dequantize_8bit(mps: ModuleType, x: Tensor, dtype: torch.dtype, block: int) -> None:
    q, absmax = reference.quantize_8bit(x, dynamic_map(), block)
    found, wanted = (m.dequantize_8bit(q, absmax, dynamic_map(), block, dtype) for m in (mps, reference))
    assert torch.equal(found, wanted)


@given(seed=st.integers(0, 2**31), blocks=st.integers(1, 600))
def test_nested(mps: ModuleType, seed: int, blocks: int) -> None:
    absmax = values("normal", blocks, dtype=torch.float32, seed=seed).abs()
    found, wanted = mps.nested_quantize(absmax), reference.nested_quantize(absmax)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    arguments = (wanted[0], wanted[1], dynamic_map(), wanted[2])
    assert torch.equal(mps.nested_dequantize(*arguments), reference.nested_dequantize(*arguments))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(mps: ModuleType, value: float) -> None:
    x = torch.zeros(4, 100)
    x[2, 30] = value
    for quantize in (
        lambda: mps.quantize_4bit(x, _CODEBOOKS[0], 64),
        lambda: mps.quantize_8bit(x, dynamic_map(), 64),
        lambda: mps.quantize_int8(x),
    ):
        with pytest.raises(NonFiniteError, match="flat index 230"):
            quantize()


def test_out_that_is_not_aligned(mps: ModuleType) -> None:
    weight = quantized(3, 33, QuantConfig())
    out = torch.zeros(1 + 99, dtype=torch.float16)
    mps.dequantize(weight.packed_weight(), torch.float16, out=out[1:].view(3, 33))
    assert torch.equal(out[1:].view(3, 33), weight.dequantize(torch.float16))
    assert out[0] == 0


def test_searches_are_the_cpus(mps: ModuleType) -> None:
    x = torch.randn(300)
    found = mps.quantize_4bit(x, _CODEBOOKS[0], 64, "mse")
    wanted = reference.quantize_4bit(x, _CODEBOOKS[0], 64, "mse")
    assert torch.equal(found[0], wanted[0])
    assert torch.allclose(found[1], wanted[1], rtol=1e-6)
