"""`dequantize(out=...)`, and outputs large enough to be written past the caches: the same bits, wherever they go."""

from __future__ import annotations

import pytest
import torch
from codec.equality import assert_same_bits
from codec.strategies import DTYPES, dtypes, weight, weights
from hypothesis import given
from hypothesis import strategies as st

from nybble import reference
from nybble.backends import cpu, portable
from nybble.errors import LayoutError, UnsupportedDtypeError
from nybble.formats import QuantConfig, codebook, dynamic_map
from nybble.nn import QuantLinear
from nybble.tensor import QuantTensor

CONFIGS = {
    "plain": QuantConfig(double_quant=False),
    "nested": QuantConfig(),
    "int8": QuantConfig(format="int8"),
}
STREAMED = 8 << 20  # bytes of an output from which kernels write past the caches


def quantized(kind, shape=(24, 72), dtype=torch.bfloat16):
    n = torch.Size(shape).numel()
    return QuantTensor.quantize(weight("normal", n, 5, dtype).reshape(shape), CONFIGS[kind])


@given(x=weights(), double_quant=st.booleans(), dtype=dtypes, offset=st.integers(0, 3))
def test_out_takes_what_would_have_been_returned(isa, x, double_quant, dtype, offset):
    tensor = QuantTensor.quantize(x, QuantConfig(double_quant=double_quant))
    buffer = torch.full((x.numel() + 8,), 7.0, dtype=dtype)
    out = buffer[offset : offset + x.numel()].view(x.shape)
    assert tensor.dequantize(dtype, out=out) is out
    assert_same_bits(out, tensor.dequantize(dtype))
    assert bool((buffer[:offset] == 7).all())
    assert bool((buffer[offset + x.numel() :] == 7).all())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_and_both_backends_write_to_out(kind, dtype):
    tensor = quantized(kind)
    expected = tensor.dequantize(dtype)
    assert_same_bits(tensor.dequantize(dtype, out=torch.empty(24, 72, dtype=dtype)), expected)
    assert_same_bits(tensor.dequantize(out=torch.empty(24, 72, dtype=dtype)), expected, "dtype taken from out")
    for backend in (cpu, portable):
        out = torch.empty(24, 72, dtype=dtype)
        assert backend.dequantize(tensor.packed_weight(), dtype, out=out) is out
        assert_same_bits(out, expected)


def test_a_layer_writes_to_out():
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 48))
    out = torch.empty(48, 64, dtype=torch.bfloat16)
    assert layer.dequantize(torch.bfloat16, out=out) is out
    assert_same_bits(out, layer.dequantize(torch.bfloat16))


@pytest.mark.parametrize("kind", CONFIGS)
def test_autograd_sees_that_out_was_written(kind):
    out = torch.ones(24, 72, dtype=torch.bfloat16)
    factor = torch.ones(24, 72, dtype=torch.bfloat16, requires_grad=True)
    product = factor * out
    quantized(kind).dequantize(out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        quantized(kind).dequantize(out=torch.empty(24, 72, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("backend", [cpu, portable])
def test_an_out_that_does_not_fit_is_refused_by_name(kind, backend):
    bad = {
        r"^out has shape \[72, 24\]; it must be \[24, 72\]": torch.empty(72, 24, dtype=torch.bfloat16),
        r"^out has shape \[1728\]; it must be \[24, 72\]": torch.empty(1728, dtype=torch.bfloat16),
        r"^out has strides \[1, 24\]; it must be contiguous": torch.empty(72, 24, dtype=torch.bfloat16).t(),
        r"^out is on meta; it must be .* on cpu": torch.empty(24, 72, dtype=torch.bfloat16, device="meta"),
        r"^out requires a gradient": torch.empty(24, 72, dtype=torch.bfloat16, requires_grad=True),
    }
    tensor = quantized(kind)
    for message, out in bad.items():
        for call in (
            tensor.dequantize,
            lambda out: backend.dequantize(tensor.packed_weight(), torch.bfloat16, out=out),
        ):
            with pytest.raises(LayoutError, match=message):
                call(out=out)
    with pytest.raises(UnsupportedDtypeError, match=r"^out has dtype torch.float16; it must be torch.float32"):
        tensor.dequantize(torch.float32, out=torch.empty(24, 72, dtype=torch.float16))
    with pytest.raises(UnsupportedDtypeError, match=r"^dtype is torch.int32; allowed are"):
        tensor.dequantize(out=torch.empty(24, 72, dtype=torch.int32))


def spread(n, dtype):
    """A buffer of n values whose lines are whole, and one whose lines are not: kernels stream only into the first."""
    size = torch.tensor([], dtype=dtype).element_size()
    buffer = torch.full((n + 64,), 7.0, dtype=dtype)
    first = -buffer.data_ptr() % 64 // size
    return buffer[first : first + n], torch.full((n + 64,), 7.0, dtype=dtype)[first + 1 : first + 1 + n]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_large_4bit_outputs(isa, threads, dtype, nested):
    n = STREAMED // torch.tensor([], dtype=dtype).element_size() + 77
    generator = torch.Generator().manual_seed(n)
    packed = torch.randint(0, 256, ((n + 1) // 2, 1), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-n // 64), generator=generator) + 0.5
    tensor = QuantTensor(packed, absmax, codebook("nf4"), 64, (n,), dtype, "nf4")
    if nested:
        tensor.absmax, tensor.nested_absmax, tensor.nested_offset = cpu.nested_quantize(absmax)
        tensor.nested_map = dynamic_map()
    expected = reference.dequantize_4bit(packed, tensor.absmax_float(), codebook("nf4"), 64, (n,), dtype)
    for count, out in zip((1, 2), spread(n, dtype), strict=True):
        threads(count)
        assert_same_bits(tensor.dequantize(out=out), expected, f"{count} threads")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 1003, 4096])
def test_large_int8_outputs(isa, threads, dtype, cols):
    rows = STREAMED // torch.tensor([], dtype=dtype).element_size() // cols + 3
    generator = torch.Generator().manual_seed(cols)
    q = torch.randint(-128, 128, (rows, cols), generator=generator, dtype=torch.int8)
    scb = torch.rand(rows, generator=generator) + 0.5
    expected = reference.dequantize_int8(q, scb, dtype)
    tensor = QuantTensor(q, scb, None, 0, (rows, cols), dtype, "int8")
    for count, out in zip((1, 2), spread(rows * cols, dtype), strict=True):
        threads(count)
        assert_same_bits(tensor.dequantize(out=out.view(rows, cols)), expected, f"{count} threads")


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_8bit_outputs(isa, dtype):
    n = STREAMED // torch.tensor([], dtype=dtype).element_size() + 77
    generator = torch.Generator().manual_seed(n)
    q = torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-n // 256), generator=generator) + 0.5
    actual = cpu.dequantize_8bit(q, absmax, dynamic_map(), 256, dtype)
    assert_same_bits(actual, reference.dequantize_8bit(q, absmax, dynamic_map(), 256, dtype))


@given(seed=st.integers(0, 2**31 - 1), dtype=dtypes)
def test_int8_quotients_are_correctly_rounded_for_any_scale(isa, seed, dtype):
    # Scales of every magnitude and sign, as a damaged or foreign file may hold them; every code.
    generator = torch.Generator().manual_seed(seed)
    scb = torch.randint(-(2**31), 2**31, (8,), generator=generator, dtype=torch.int64).to(torch.int32)
    scb = scb.view(torch.float32).nan_to_num(1.0, 3e38, -3e38)
    scb[0], scb[1] = 0.0, -0.0
    q = torch.arange(-128, 128, dtype=torch.int8).repeat(8, 1)
    assert_same_bits(cpu.dequantize_int8(q, scb, dtype), reference.dequantize_int8(q, scb, dtype))
