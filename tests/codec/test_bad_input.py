"""What the codecs refuse, and that the message names it."""

from __future__ import annotations

import pytest
import torch
from codec.strategies import DTYPES, weight

from nybble.errors import NonFiniteError
from nybble.formats import codebook, dynamic_map

NF4 = codebook("nf4")


def calls(codec):
    """Name -> a quantizer of one flat tensor."""
    return {
        "absmax": lambda x, name: codec.quantize_4bit(x, NF4, 64, name=name),
        "mse": lambda x, name: codec.quantize_4bit(x, NF4, 64, search="mse", name=name),
        "8bit": lambda x, name: codec.quantize_8bit(x, dynamic_map(), 64, name=name),
        "int8": lambda x, name: codec.quantize_int8(x.reshape(1, -1), name=name),
    }


@pytest.mark.parametrize("kind", ["absmax", "mse", "8bit", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_name_the_tensor_and_the_place(codec, kind, bad, dtype):
    for n, index in ((1, 0), (64, 63), (200, 0), (200, 70), (200, 199), (70_000, 69_999)):
        x = weight("normal", n, 1, dtype)
        x[index] = bad
        with pytest.raises(NonFiniteError, match=r"^model\.layers\.3\.up_proj\.weight: ") as raised:
            calls(codec)[kind](x, "model.layers.3.up_proj.weight")
        assert isinstance(raised.value, ValueError)
        assert (raised.value.index, raised.value.count) == (index, 1)
        assert f"flat index {index} " in str(raised.value)


@pytest.mark.parametrize("kind", ["absmax", "mse", "8bit", "int8"])
def test_the_first_of_several_non_finite_values_is_reported(codec, kind):
    x = weight("normal", 5000, 1)
    x[[4000, 300, 700]] = torch.tensor([float("inf"), float("nan"), float("nan")])
    with pytest.raises(NonFiniteError) as raised:
        calls(codec)[kind](x, "w")
    assert (raised.value.index, raised.value.count) == (300, 3)


def test_int8_refuses_what_fp16_cannot_hold(codec):
    x = torch.ones(4, 8)
    x[2, 3] = 70000.0
    with pytest.raises(NonFiniteError, match=r"^w: .*fp16.*70000\.0 at flat index 19"):
        codec.quantize_int8(x, "w")


@pytest.mark.parametrize("block_size", [0, 1, 16, 48, 65, 8192, -64, 64.0, "64", None, True])
def test_block_sizes_that_are_not_allowed(codec, block_size):
    x = torch.ones(64)
    for call in (
        lambda: codec.quantize_4bit(x, NF4, block_size),
        lambda: codec.quantize_8bit(x, dynamic_map(), block_size),
        lambda: codec.dequantize_4bit(
            torch.zeros(32, 1, dtype=torch.uint8), torch.ones(1), NF4, block_size, (64,), x.dtype
        ),
    ):
        with pytest.raises(ValueError, match=r"block_size is .*allowed are 32, 64, 128, 256, 512, 1024, 2048, 4096"):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_dtypes_that_are_not_supported(codec, dtype):
    x = torch.ones(64, dtype=dtype)
    for call in calls(codec).values():
        with pytest.raises(TypeError, match=r"^w has dtype .*float32"):
            call(x, "w")


@pytest.mark.parametrize("codes", [torch.zeros(15), torch.zeros(17), torch.zeros(4, 4), NF4.double(), NF4.half()])
def test_codebooks_of_the_wrong_size_or_dtype(codec, codes):
    with pytest.raises((ValueError, TypeError), match="codebook has"):
        codec.quantize_4bit(torch.ones(64), codes, 64)
    with pytest.raises((ValueError, TypeError), match="codebook has"):
        codec.dequantize_4bit(torch.zeros(32, 1, dtype=torch.uint8), torch.ones(1), codes, 64, (64,), torch.float32)


def test_unknown_search(codec):
    with pytest.raises(ValueError, match="search is 'best'; allowed are absmax, mse"):
        codec.quantize_4bit(torch.ones(64), NF4, 64, "best")


@pytest.mark.parametrize(
    ("n_bytes", "n_scales", "what"), [(31, 1, "packed"), (33, 1, "packed"), (32, 0, "absmax"), (32, 2, "absmax")]
)
def test_sizes_that_do_not_match_the_shape(codec, n_bytes, n_scales, what):
    packed, absmax = torch.zeros(n_bytes, 1, dtype=torch.uint8), torch.ones(n_scales)
    with pytest.raises(ValueError, match=f"{what} has"):
        codec.dequantize_4bit(packed, absmax, NF4, 64, (8, 8), torch.float32)


def test_packed_and_scales_of_the_wrong_dtype(codec):
    packed, absmax = torch.zeros(32, 1, dtype=torch.uint8), torch.ones(1)
    with pytest.raises(TypeError, match=r"packed has dtype torch.int8"):
        codec.dequantize_4bit(packed.to(torch.int8), absmax, NF4, 64, (64,), torch.float32)
    with pytest.raises(TypeError, match=r"absmax has dtype torch.uint8"):
        codec.dequantize_4bit(packed, absmax.byte(), NF4, 64, (64,), torch.float32)


def test_int8_takes_a_matrix(codec):
    with pytest.raises(ValueError, match=r"w has shape \(2, 3, 4\)"):
        codec.quantize_int8(torch.ones(2, 3, 4), "w")
    with pytest.raises(ValueError, match="has 2 elements"):
        codec.dequantize_int8(torch.ones(3, 4, dtype=torch.int8), torch.ones(2), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_nothing_is_decoded_to(codec, dtype):
    packed, one = torch.zeros(32, 1, dtype=torch.uint8), torch.ones(1)
    for call in (
        lambda: codec.dequantize_4bit(packed, one, NF4, 64, (64,), dtype),
        lambda: codec.dequantize_8bit(packed, one, dynamic_map(), 64, dtype),
        lambda: codec.dequantize_int8(packed.to(torch.int8), torch.ones(32), dtype),
    ):
        with pytest.raises(TypeError, match="dtype is torch"):
            call()


def test_8bit_codes_and_scales_of_the_wrong_dtype(codec):
    q, absmax = torch.zeros(64, dtype=torch.uint8), torch.ones(1)
    for codes, scales, what in ((q.long(), absmax, "q"), (q.char(), absmax, "q"), (q, absmax.half(), "absmax")):
        with pytest.raises(TypeError, match=f"{what} has dtype"):
            codec.dequantize_8bit(codes, scales, dynamic_map(), 64, torch.float32)
    with pytest.raises(TypeError, match=r"has dtype torch.uint8"):
        codec.dequantize_int8(q.reshape(8, 8), torch.ones(8), torch.float32)
    with pytest.raises(TypeError, match=r"has dtype torch.float16"):
        codec.dequantize_int8(q.reshape(8, 8).char(), torch.ones(8).half(), torch.float32)


def test_tensors_on_different_devices(codec):
    elsewhere = NF4.to("meta")
    packed, absmax = torch.zeros(32, 1, dtype=torch.uint8), torch.ones(1)
    for call in (
        lambda: codec.quantize_4bit(torch.ones(64), elsewhere, 64),
        lambda: codec.dequantize_4bit(packed, absmax, elsewhere, 64, (64,), torch.float32),
        lambda: codec.quantize_8bit(torch.ones(64), dynamic_map().to("meta"), 64),
        lambda: codec.dequantize_8bit(packed, absmax, dynamic_map().to("meta"), 64, torch.float32),
    ):
        with pytest.raises(ValueError, match=r"codebook is on meta; it must be .*on cpu"):
            call()
    with pytest.raises(ValueError, match=r"absmax is on meta; it must be .*on cpu"):
        codec.dequantize_4bit(packed, absmax.to("meta"), NF4, 64, (64,), torch.float32)
