"""bitsandbytes as a peer, tensor by tensor: what it writes nybble reads, and the other way round, bit for bit.

Its own CPU dequantization is wrong where K % 16 == 0 and K % block != 0 (blocks that straddle rows), so there only
bytes and what nybble decodes are compared. Scales that are quantized themselves go through its 8-bit quantizer, which
on the CPU picks other codes than its CUDA kernels: those are compared by what they decode to.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nybble
from nybble import QuantConfig, QuantLinear, QuantTensor, reference
from nybble.formats import BLOCK_SIZES

pytestmark = [pytest.mark.bitsandbytes, pytest.mark.filterwarnings("ignore")]
# Rows and columns that are multiples of every small block, of none, odd in number, shorter than a block.
SHAPES = [(64, 128), (63, 65), (5, 7), (24, 72), (3, 96), (31, 100), (2, 4304)]
STORAGES = [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(scope="module")
def bnb() -> Iterator[Any]:
    package = pytest.importorskip("bitsandbytes")
    with torch.compiler.set_stance("force_eager"):  # it compiles its fallbacks, for seconds a shape
        yield package


def weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


def theirs(bnb: Any, value: torch.Tensor, format: str, block: int, nested: bool, storage: torch.dtype) -> Any:
    """(the tensors that bitsandbytes saves for a weight, its quant_state)."""
    packed, state = bnb.functional.quantize_4bit(
        value, blocksize=block, compress_statistics=nested, quant_type=format, quant_storage=storage
    )
    return {"weight": packed, **{f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}}, state


def decodes_rightly(shape: tuple[int, int], block: int) -> bool:
    return shape[1] % 16 != 0 or shape[1] % block == 0


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_4_bits_both_ways(bnb: Any, format: str, block: int, shape: tuple[int, int]) -> None:
    exact = weight(shape)
    config = QuantConfig(format, block_size=block, double_quant=False)
    ours = QuantTensor.quantize(exact, config)
    state, _ = theirs(bnb, exact, format, block, False, torch.uint8)
    assert state.keys() == ours.state().keys()
    for key, value in ours.state().items():
        assert torch.equal(state[key], value), key
    decoded = reference.dequantize_4bit(
        state["weight"], state["weight.absmax"], state["weight.quant_map"], block, shape, torch.float32
    )
    assert torch.equal(QuantTensor.from_state(state).dequantize(), decoded)
    statistics = {key.removeprefix("weight."): value for key, value in ours.state().items() if key != "weight"}
    read = bnb.functional.QuantState.from_dict(statistics, device=torch.device("cpu"))
    assert (read.blocksize, read.quant_type, tuple(read.shape), read.nested) == (block, format, shape, False)
    if decodes_rightly(shape, block):
        assert torch.equal(bnb.functional.dequantize_4bit(ours.packed, read), decoded)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 1024])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (3, 96)], ids=str)
def test_scales_in_8_bits_decode_alike(bnb: Any, format: str, block: int, shape: tuple[int, int]) -> None:
    state, read = theirs(bnb, weight(shape), format, block, True, torch.uint8)
    mine = QuantTensor.from_state(state)
    assert mine.is_nested
    ours = QuantTensor.quantize(weight(shape), QuantConfig(format, block_size=block))
    statistics = {key.removeprefix("weight."): value for key, value in ours.state().items() if key != "weight"}
    back = bnb.functional.QuantState.from_dict(statistics, device=torch.device("cpu"))
    assert torch.equal(ours.packed, state["weight"])
    if decodes_rightly(shape, block):
        assert torch.equal(mine.dequantize(), bnb.functional.dequantize_4bit(state["weight"], read))
        assert torch.equal(ours.dequantize(), bnb.functional.dequantize_4bit(ours.packed, back))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_any_storage_dtype_through_a_file(bnb: Any, tmp_path: Path, storage: torch.dtype, nested: bool) -> None:
    shape = (24, 72)
    state, _ = theirs(bnb, weight(shape), "nf4", 32, nested, storage)
    assert state["weight"].dtype == storage
    plain, _ = theirs(bnb, weight(shape), "nf4", 32, nested, torch.uint8)
    expected = QuantTensor.from_state(plain).dequantize()
    assert torch.equal(QuantTensor.from_state(state).dequantize(), expected)
    base, file = tmp_path / "base", "model.safetensors"
    base.mkdir()
    save_file({f"fc.{key}": value.contiguous() for key, value in state.items()}, base / file)
    net = nn.ModuleDict({"fc": QuantLinear(shape[1], shape[0])})
    nybble.load_into(net, base)
    assert torch.equal(net["fc"].dequantize(), expected)
    factors = {"lora_A": torch.randn(2, shape[1]), "lora_B": torch.zeros(shape[0], 2)}
    (tmp_path / "adapter").mkdir()
    adapter = {f"base_model.model.fc.{name}.weight": value for name, value in factors.items()}
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    nybble.merge(base, tmp_path / "adapter", tmp_path / "merged", "fp32")
    assert torch.equal(load_file(tmp_path / "merged" / file)["fc.weight"], expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_4_bit_layer_takes_our_weight(bnb: Any, shape: tuple[int, int]) -> None:
    ours = QuantTensor.quantize(weight(shape), QuantConfig(block_size=32, double_quant=False))
    statistics = {key: value for key, value in ours.state().items() if key != "weight"}
    given = bnb.nn.Params4bit.from_prequantized(ours.packed, statistics, device="cpu")
    assert (given.blocksize, given.quant_type) == (32, "nf4")
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4", quant_storage=torch.uint8)
    layer.weight = given
    saved = layer.state_dict()
    assert saved.keys() == ours.state().keys()
    for key, value in ours.state().items():
        assert torch.equal(saved[key], value), key


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_both_ways(bnb: Any, shape: tuple[int, int]) -> None:
    layer = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
    exact = weight(shape).half()
    layer.weight = bnb.nn.Int8Params(exact.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    state = layer.state_dict()
    read = QuantTensor.from_state(state)
    ours = QuantTensor.quantize(exact, QuantConfig("int8"))
    assert torch.equal(ours.packed, state["weight"]) and torch.equal(ours.absmax, state["SCB"])
    decoded = state["weight"].float() * (state["SCB"][:, None] / 127)
    torch.testing.assert_close(read.dequantize(torch.float32), decoded, rtol=1e-6, atol=0)
    back = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
    back.weight = bnb.nn.Int8Params(torch.zeros(shape).half(), requires_grad=False, has_fp16_weights=False).to("cpu")
    back.load_state_dict(ours.state())
    assert torch.equal(back.weight.CB if back.weight.CB is not None else back.weight.data, ours.packed)
    assert torch.equal(back.weight.SCB, ours.absmax)
