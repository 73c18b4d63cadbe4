"""`QuantTensor`: the layout of a state, its way back, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from codec.equality import assert_same_bits
from codec.strategies import DTYPES, weight, weights
from hypothesis import given
from hypothesis import strategies as st

from nybble.errors import LayoutError, NonFiniteError
from nybble.formats import BLOCK_SIZES, QuantConfig, codebook, dynamic_map
from nybble.tensor import QuantTensor

CUSTOM = tuple(i / 8 - 1 for i in range(16))
FORMATS = ("nf4", "fp4", "int4", CUSTOM)


def make(fmt="nf4", dtype=torch.bfloat16, double_quant=True, shape=(24, 72), **fields):
    n = torch.Size(shape).numel()
    config = QuantConfig(format=fmt, double_quant=double_quant, **fields)
    return QuantTensor.quantize(weight("normal", n, 5, dtype).reshape(shape), config)


def same(a: QuantTensor, b: QuantTensor) -> None:
    assert (a.block_size, a.shape, a.dtype, a.format) == (b.block_size, b.shape, b.dtype, b.format)
    assert a._tensors().keys() == b._tensors().keys()
    for key, tensor in a._tensors().items():
        assert_same_bits(tensor, b._tensors()[key], key)


def header(state):
    (key,) = [key for key in state if "quant_state" in key]
    return key, json.loads(bytes(state[key].tolist()))


def with_header(state, **changes):
    key, values = header(state)
    text = json.dumps({k: v for k, v in {**values, **changes}.items() if v is not ...})
    return {**state, key: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def test_state_is_the_documented_layout():
    quantized = make()
    state = quantized.state()
    assert list(state) == [
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    ]
    n, blocks = 24 * 72, 27
    layout = {key: (value.dtype, tuple(value.shape)) for key, value in state.items()}
    assert layout["weight"] == (torch.uint8, (n // 2, 1))
    assert layout["weight.absmax"] == (torch.uint8, (blocks,))
    assert layout["weight.quant_map"] == (torch.float32, (16,))
    assert layout["weight.nested_absmax"] == (torch.float32, (1,))
    assert layout["weight.nested_quant_map"] == (torch.float32, (256,))
    offset = quantized.nested_offset.item()
    assert bytes(state["weight.quant_state.bitsandbytes__nf4"].tolist()).decode() == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [24, 72], "nested_blocksize": 256, '
        f'"nested_dtype": "float32", "nested_offset": {offset!r}}}'
    )


def test_state_without_double_quantization():
    state = make("fp4", torch.float16, double_quant=False, block_size=128).state()
    assert list(state) == ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__fp4"]
    assert state["weight.absmax"].dtype == torch.float32
    assert header(state)[1] == {"quant_type": "fp4", "blocksize": 128, "dtype": "float16", "shape": [24, 72]}


@pytest.mark.parametrize(("fmt", "name"), [("int4", "int4"), (CUSTOM, "custom")])
def test_formats_of_our_own_cannot_be_taken_for_bitsandbytes(fmt, name):
    state = make(fmt).state()
    assert header(state)[0] == f"weight.quant_state.nybble__{name}"
    assert_same_bits(state["weight.quant_map"], codebook(fmt))


def test_int8_state_is_the_documented_layout():
    state = make("int8").state()
    assert list(state) == ["weight", "SCB", "weight_format"]
    layout = {key: (value.dtype, tuple(value.shape)) for key, value in state.items()}
    assert layout == {
        "weight": (torch.int8, (24, 72)),
        "SCB": (torch.float32, (24,)),
        "weight_format": (torch.uint8, ()),
    }
    restored = QuantTensor.from_state(state, dtype=torch.bfloat16)
    same(restored, make("int8"))
    assert QuantTensor.from_state(state).dtype == torch.float16


@given(
    x=weights(),
    fmt=st.sampled_from(FORMATS),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
)
def test_state_round_trip_is_bit_exact(x, fmt, block_size, double_quant):
    quantized = QuantTensor.quantize(x, QuantConfig(format=fmt, block_size=block_size, double_quant=double_quant))
    restored = QuantTensor.from_state(quantized.state())
    same(restored, quantized)
    assert restored.shape == tuple(x.shape)
    assert_same_bits(restored.dequantize(), quantized.dequantize())
    assert quantized.dequantize().dtype == x.dtype


@given(
    shape=st.tuples(st.integers(0, 20), st.integers(0, 70)),
    fmt=st.sampled_from((*FORMATS, "int8")),
    dtype=st.sampled_from(DTYPES),
)
def test_every_isa_gives_the_same_tensor(isa, shape, fmt, dtype):
    from nybble import backends

    quantized = make(fmt, dtype, shape=shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "of", lambda _: backends.portable)
        same(quantized, make(fmt, dtype, shape=shape))
        expected = quantized.dequantize()
    assert_same_bits(quantized.dequantize(), expected)


@pytest.mark.parametrize(
    "storage",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int64],
    ids=str,
)
def test_quant_storage_of_any_dtype_is_the_same_bytes(storage):
    quantized = make(double_quant=False)
    state = quantized.state()
    state["weight"] = state["weight"].reshape(-1).view(storage).unsqueeze(1)
    same(QuantTensor.from_state(state), quantized)


def test_tensors_are_shared_not_copied():
    state = make().state()
    restored = QuantTensor.from_state(state)
    assert restored.packed.data_ptr() == state["weight"].data_ptr()
    assert restored.absmax.data_ptr() == state["weight.absmax"].data_ptr()
    assert restored.state()["weight"].data_ptr() == state["weight"].data_ptr()
    assert restored.to("cpu").packed.data_ptr() == restored.packed.data_ptr()


def test_maps_of_the_file_are_used():
    state = make(double_quant=False).state()
    state["weight.quant_map"] = codebook("nf4") / 2
    halved = QuantTensor.from_state(state).dequantize(torch.float32)
    assert_same_bits(halved, make(double_quant=False).dequantize(torch.float32) / 2)


def test_three_dimensional_weights_keep_their_shape():
    quantized = make(shape=(3, 8, 40))
    assert quantized.dequantize().shape == (3, 8, 40)
    assert QuantTensor.from_state(quantized.state()).shape == (3, 8, 40)


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_sizes_copies_and_text(fmt):
    quantized = make(fmt)
    held = quantized._tensors()
    assert quantized.numel == 24 * 72
    assert quantized.nbytes == sum(t.nbytes for t in held.values())
    assert quantized.is_nested is (fmt == "nf4")
    same(copy.deepcopy(quantized), quantized)
    same(pickle.loads(pickle.dumps(quantized)), quantized)
    assert "shape=[24, 72], dtype=bfloat16" in repr(quantized)


def test_decoded_scales():
    assert_same_bits(make(double_quant=False).absmax_float(), make(double_quant=False).absmax)
    nested = make()
    expected = dynamic_map()[nested.absmax.long()] * nested.nested_absmax + nested.nested_offset
    assert_same_bits(nested.absmax_float(), expected)


def test_gradients_do_not_flow():
    quantized = QuantTensor.quantize(torch.randn(8, 8, requires_grad=True))
    assert not quantized.dequantize().requires_grad


def test_errors_of_quantize_name_the_weight():
    with pytest.raises(NonFiniteError, match=r"^layer\.1\.weight: "):
        QuantTensor.quantize(torch.tensor([1.0, float("nan")]), name="layer.1.weight")
    with pytest.raises(TypeError, match=r"^layer\.1\.weight has dtype torch.float64"):
        QuantTensor.quantize(torch.ones(4, dtype=torch.float64), name="layer.1.weight")
    with pytest.raises(LayoutError, match=r"^layer\.1\.weight has shape \(4,\); int8"):
        QuantTensor.quantize(torch.ones(4), QuantConfig(format="int8"), name="layer.1.weight")
    with pytest.raises(TypeError, match=r"dtype is torch.float64"):
        make().dequantize(torch.float64)


def replaced(key, value):
    return lambda state: {**state, key: value}


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


BYTES = torch.zeros(24 * 72 // 2, 1, dtype=torch.uint8)
HEADER = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("weight"), "w: there is no packed tensor"),
        (without("weight.absmax"), "w: missing w.absmax"),
        (without("weight.quant_map"), "w: missing w.quant_map"),
        (without("weight.nested_quant_map"), "w: missing w.nested_quant_map"),
        (without("weight.nested_absmax"), "w.absmax has dtype torch.uint8"),
        (without(HEADER), "w: found no quant_state key; exactly one"),
        (replaced("weight.quant_state.bitsandbytes__fp4", BYTES), "w: found .*exactly one"),
        (replaced("weight", BYTES[1:]), r"w has shape \[863, 1\]; it must be \[864, 1\] for shape \[24, 72\]"),
        (
            replaced("weight", BYTES.to(torch.int16)),
            r"w has dtype torch\.\w+ and shape .*, which is 1728 bytes; .* are 864 bytes",
        ),
        (replaced("weight.absmax", torch.zeros(26, dtype=torch.uint8)), r"w.absmax has shape \[26\].*\[27\]"),
        (replaced("weight.absmax", torch.zeros(27)), "w.absmax has dtype torch.float32; it must be torch.uint8"),
        (replaced("weight.quant_map", torch.zeros(15)), r"w.quant_map has shape \[15\]"),
        (replaced("weight.quant_map", torch.zeros(16).double()), "w.quant_map has dtype torch.float64"),
        (replaced("weight.nested_absmax", torch.zeros(2)), r"w.nested_absmax has shape \[2\].*\[1\]"),
        (replaced("weight.nested_quant_map", torch.zeros(16)), r"w.nested_quant_map has shape \[16\]"),
        (replaced(HEADER, torch.zeros(4)), f"w.{HEADER[7:]} has dtype torch.float32"),
        (replaced(HEADER, torch.tensor(list(b"{nope"), dtype=torch.uint8)), "does not hold JSON"),
        (replaced(HEADER, torch.tensor([255, 254], dtype=torch.uint8)), "does not hold JSON"),
        (replaced(HEADER, torch.tensor(list(b"[1]"), dtype=torch.uint8)), "must be an object"),
        (lambda s: with_header(s, quant_type="fp4"), "'quant_type' is 'fp4'; it must be 'nf4'"),
        (lambda s: with_header(s, blocksize=48), "'blocksize' is 48; it must be one of 32, 64"),
        (lambda s: with_header(s, blocksize=True), "'blocksize' is True"),
        (lambda s: with_header(s, blocksize=32), r"w.absmax has shape \[27\].*\[54\]"),
        (lambda s: with_header(s, dtype="float64"), "'dtype' is 'float64'"),
        (lambda s: with_header(s, dtype=["float16"]), "'dtype' is "),
        (lambda s: with_header(s, shape=None), "'shape' is None"),
        (lambda s: with_header(s, shape=[24, -72]), "'shape' is "),
        (lambda s: with_header(s, shape=[24, 73]), "it must be .* for shape"),
        (lambda s: with_header(s, shape=[2**62, 2**62]), "it must be .* for shape"),
        (lambda s: with_header(s, nested_blocksize=128), "'nested_blocksize' is 128; it must be 256"),
        (lambda s: with_header(s, nested_dtype="float16"), "'nested_dtype' is 'float16'"),
        (lambda s: with_header(s, nested_offset="x"), "'nested_offset' is 'x'"),
        (lambda s: with_header(s, nested_offset=float("nan")), "'nested_offset' is nan"),
        (lambda s: with_header(s, nested_offset=1e300), "'nested_offset' is 1e"),
        (lambda s: with_header(s, nested_offset=10**400), "'nested_offset' is 1000"),
        (lambda s: with_header(s, nested_offset=...), "w: there is a nested_absmax, but .* no nested_offset"),
    ],
)
def test_damaged_states_are_refused_and_the_tensor_named(damage, message):
    with pytest.raises((LayoutError, TypeError), match=message) as raised:
        QuantTensor.from_state(damage(make().state()), name="w")
    assert str(raised.value).startswith("w")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replaced("SCB", torch.ones(23)), r"w: SCB has shape \[23\]; it must be \[24\]"),
        (replaced("SCB", torch.ones(24).half()), "w: SCB has dtype torch.float16"),
        (replaced("weight", torch.ones(24, 72)), "w has dtype torch.float32; it must be torch.int8"),
        (replaced("weight", torch.ones(24, 3, 24, dtype=torch.int8)), "w has shape .*matrix"),
        (replaced("weight_format", torch.tensor(2, dtype=torch.uint8)), "w: weight_format is 2"),
    ],
)
def test_damaged_int8_states_are_refused(damage, message):
    with pytest.raises((LayoutError, TypeError), match=message):
        QuantTensor.from_state(damage(make("int8").state()), name="w")


@pytest.mark.parametrize("key", ["weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"])
def test_a_scale_or_code_that_is_not_finite_is_refused_by_name(key):
    state = {name: tensor.clone() for name, tensor in make().state().items()}
    state[key][0] = float("nan")
    with pytest.raises(LayoutError, match=key.removeprefix("weight.")):
        QuantTensor.from_state(state)
