"""Layers, operators and their gradients on the CUDA kernels, which run in the shim: the whole way from `nybble`."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import nybble
from nybble import LoRALinear, QuantConfig, QuantLinear, reference


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_and_its_gradient(on_shim: ModuleType, capability: int, format: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    on_shim.core().force_kernel("linear_mma")  # where it can
    layer = LoRALinear.from_base(QuantLinear.from_linear(torch.nn.Linear(128, 96), QuantConfig(format)), r=8, alpha=16)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(5, 128, dtype=dtype, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, grad)

    weight = layer.base.dequantize().double()
    weight = weight + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    expected = x.double() @ weight.t() + layer.base.bias.double()
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for got, wanted in ((y, expected), (dx, grad.double() @ weight)):
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_it_is_the_shim_that_runs(on_shim: ModuleType, shim: ModuleType) -> None:
    before = shim.launches()
    packed = nybble.QuantTensor.quantize(torch.randn(64, 64), QuantConfig())
    packed.dequantize(torch.bfloat16)
    assert shim.launches() > before


def test_outputs_are_the_references(on_shim: ModuleType) -> None:
    x = torch.randn(70, 33)
    quantized = nybble.QuantTensor.quantize(x, QuantConfig(double_quant=False))
    packed, absmax = reference.quantize_4bit(x, quantized.codebook, 64)
    assert torch.equal(quantized.packed.flatten(), packed.flatten()) and torch.equal(quantized.absmax, absmax)
