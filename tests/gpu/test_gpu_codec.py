"""Quantizing and dequantizing on a GPU: the bits of the CPU's kernels, which are the file format's."""

from __future__ import annotations

import gpu.needed  # noqa: F401  (skips this file without a GPU)
import pytest
import torch
from codec.equality import assert_same_bits
from codec.strategies import block_sizes, codebooks, weights
from gpu.on_gpu import EXAMPLES, poison
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import exact

from nybble import QuantConfig, QuantTensor, reference
from nybble.backends import cpu, cuda
from nybble.errors import NonFiniteError
from nybble.formats import codebook, dynamic_map

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = ("nf4", "fp4", "int4", "int8")
#: (rows, columns): real ones, a last block that is not full, an odd number of elements.
SIZES = ((4096, 4096), (11008, 4096), (1001, 999), (3, 1), (1, 65))


def on(gpu, *tensors):
    return tuple(tensor.to(gpu) for tensor in tensors)


def assert_pair(actual, expected, what=""):
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours.cpu(), theirs, what)


@settings(max_examples=2 * EXAMPLES)
@given(x=weights(), codes=codebooks, block_size=block_sizes, dtype=st.sampled_from(DTYPES))
def test_4bit_bits_are_the_cpus(gpu, x, codes, block_size, dtype):
    expected = cpu.quantize_4bit(x, codes, block_size)
    actual = cuda.quantize_4bit(*on(gpu, x, codes), block_size)
    assert_pair(actual, expected, "quantize_4bit")
    poison(gpu, tuple(x.shape), dtype)
    back = cuda.dequantize_4bit(*actual, codes.to(gpu), block_size, x.shape, dtype)
    assert_same_bits(back.cpu(), cpu.dequantize_4bit(*expected, codes, block_size, x.shape, dtype), "dequantize_4bit")


@settings(max_examples=EXAMPLES)
@given(x=weights(), block_size=block_sizes, dtype=st.sampled_from(DTYPES))
def test_8bit_bits_are_the_cpus(gpu, x, block_size, dtype):
    code = dynamic_map()
    expected = cpu.quantize_8bit(x, code, block_size)
    actual = cuda.quantize_8bit(*on(gpu, x, code), block_size)
    assert_pair(actual, expected, "quantize_8bit")
    back = cuda.dequantize_8bit(*actual, code.to(gpu), block_size, dtype)
    assert_same_bits(back.cpu(), cpu.dequantize_8bit(*expected, code, block_size, dtype), "dequantize_8bit")


@settings(max_examples=EXAMPLES)
@given(x=weights(finite_in_half=True).filter(lambda x: x.dim() == 2), dtype=st.sampled_from(DTYPES))
def test_int8_bits_are_the_cpus(gpu, x, dtype):
    expected = cpu.quantize_int8(x)
    actual = cuda.quantize_int8(x.to(gpu))
    assert_pair(actual, expected, "quantize_int8")
    back = cuda.dequantize_int8(*actual, dtype)
    assert_same_bits(back.cpu(), cpu.dequantize_int8(*expected, dtype), "dequantize_int8")


@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_whole_weights_have_the_bits_of_the_cpu(gpu, format, rows, columns):
    torch.manual_seed(rows)
    for dtype in DTYPES:
        weight = torch.randn(rows, columns, dtype=torch.float32).to(dtype)
        for double_quant in (False, True) if format != "int8" else (False,):
            config = QuantConfig(format=format, double_quant=double_quant)
            ours, theirs = QuantTensor.quantize(weight.to(gpu), config), QuantTensor.quantize(weight, config)
            if double_quant:
                # The offset is torch's mean of up to 2^15 fp32 scales, in an order that differs between devices.
                assert ours.nested_offset.item() == pytest.approx(theirs.nested_offset.item(), rel=2.0**15 * 2.0**-24)
                theirs = ours.to("cpu")
                offset, scales = ours.nested_offset.cpu(), cpu.quantize_4bit(weight, theirs.codebook, 64)[1]
                q, nested = cpu.quantize_8bit(scales - offset, dynamic_map(), 256, name="absmax")
                assert_same_bits(theirs.absmax, q)
                assert_same_bits(theirs.nested_absmax, nested)
            else:
                for key, value in theirs.state().items():
                    assert_same_bits(ours.state()[key].cpu(), value, key)
            for out in DTYPES:
                poison(gpu, (rows, columns), out)
                assert_same_bits(ours.dequantize(out).cpu(), theirs.dequantize(out), f"{format} {out}")


@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
def test_real_sizes_in_every_block_size(gpu, block_size):
    torch.manual_seed(block_size)
    weight, codes = torch.randn(2048, 4104, dtype=torch.bfloat16), codebook("nf4")
    expected = cpu.quantize_4bit(weight, codes, block_size)
    assert_pair(cuda.quantize_4bit(*on(gpu, weight, codes), block_size), expected)


@pytest.mark.parametrize("search", ["mse", "square"])
def test_searched_scales_are_as_good_as_the_cpus(gpu, search):
    # Both stay below absmax's error (tests/codec/test_search.py); sums in another order may find another scale.
    torch.manual_seed(0)
    weight, codes = torch.randn(512, 1024), codebook("nf4")
    errors = []
    for backend, device in ((cpu, "cpu"), (cuda, gpu)):
        packed, absmax = backend.quantize_4bit(*on(device, weight, codes), 64, search)
        back = backend.dequantize_4bit(packed, absmax, codes.to(device), 64, weight.shape, torch.float32)
        errors.append((back.cpu().double() - weight.double()).reshape(-1, 64).square().sum(1))
    energy = weight.double().reshape(-1, 64).square().sum(1)
    assert bool((errors[1] <= errors[0] + 2.0**-14 * energy).all())


def test_not_finite_names_the_element(gpu):
    x = torch.randn(100, 64)
    x[50, 7] = float("nan")
    with pytest.raises(NonFiniteError) as theirs:
        cpu.quantize_4bit(x, codebook("nf4"), 64)
    with pytest.raises(NonFiniteError) as ours:
        cuda.quantize_4bit(*on(gpu, x, codebook("nf4")), 64)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("shape", [(64, 128), (1001, 999), (4096, 4096)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_writes_all_of_out_and_nothing_beside_it(gpu, dtype, shape):
    tensor = QuantTensor.quantize(torch.randn(*shape, device=gpu))
    count, guard = tensor.numel, 256
    memory = torch.full((count + 2 * guard,), float("nan"), dtype=dtype, device=gpu)
    for offset in (guard, guard + 1):  # aligned and not
        memory.fill_(float("nan"))
        out = memory[offset : offset + count].view(shape)
        assert tensor.dequantize(out=out) is out
        assert_same_bits(out, reference_of(tensor, dtype))
        assert bool(memory[:offset].isnan().all()) and bool(memory[offset + count :].isnan().all())


def reference_of(tensor, dtype):
    scales = reference.nested_dequantize(
        tensor.absmax, tensor.nested_absmax, tensor.nested_map, tensor.nested_offset, tensor.nested_block_size
    )
    return reference.dequantize_4bit(
        tensor.packed, scales, tensor.codebook, tensor.block_size, tensor.shape, torch.float32
    ).to(dtype)


def test_packed_bytes_may_start_anywhere(gpu):
    tensor = QuantTensor.quantize(torch.randn(64, 128, device=gpu))
    memory = torch.empty(tensor.packed.numel() + 16, dtype=torch.uint8, device=gpu)
    expected, packed = tensor.dequantize(), tensor.packed
    for offset in (1, 2, 4, 8, 15):
        tensor.packed = memory[offset : offset + packed.numel()].view(-1, 1)
        tensor.packed.copy_(packed)
        assert_same_bits(tensor.dequantize(), expected)


def test_dequantize_of_more_than_two_to_the_31_elements(gpu):
    n, k = 65_664, 32_768
    if torch.cuda.mem_get_info(gpu)[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    tensor = exact.weight(n, k, int8=False, block=64, nested=True, seed=0, device=gpu)
    poison(gpu, (n, k), torch.bfloat16)
    dense = tensor.dequantize(torch.bfloat16)
    for first in (0, 2**31 // k - 8, n - 16):
        assert torch.equal(dense[first : first + 16].double(), exact.rows_of(tensor, first, first + 16))
    del dense
    torch.cuda.empty_cache()
