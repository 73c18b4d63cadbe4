"""What autograd, torch.func and tracers are promised beyond plain gradients, and ordinary uses of outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nybble
from nybble import ops


def quantized(out_features: int = 24, in_features: int = 64, **config: object) -> nybble.QuantLinear:
    torch.manual_seed(0)
    return nybble.QuantLinear.from_linear(nn.Linear(in_features, out_features), nybble.QuantConfig(**config))


def adapted() -> nybble.LoRALinear:
    layer = nybble.LoRALinear.from_base(quantized(), r=4, alpha=8)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


@pytest.mark.parametrize("make", [quantized, adapted])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64), (64,)])
def test_outputs_may_be_changed_in_place(make, shape):
    x = torch.randn(shape, requires_grad=True)
    nn.Sequential(make(), nn.ReLU(inplace=True))(x).sum().backward()
    y = make()(x)
    y += 1
    y.mul_(2).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_second_derivative_of_the_plain_layer():
    layer = quantized()
    weight, bias, x = layer.dequantize(), layer.bias.detach(), torch.randn(2, 64)
    ours = torch.autograd.functional.hessian(lambda x: (layer(x) ** 2).sum(), x)
    dense = torch.autograd.functional.hessian(lambda x: ((x @ weight.T + bias) ** 2).sum(), x)
    torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("path", ["eager", "operator"])
def test_gradient_penalty_through_lora(path):
    layer = adapted()
    base, bias, scaling = layer.base.packed_weight(), layer.base.bias.detach(), layer.scaling
    weight, x = layer.base.dequantize(), torch.randn(3, 64)

    def call(x, a, b):
        if path == "eager":
            return ops.lora_linear(x, base, bias, a, b, scaling)
        return torch.ops.nybble.lora_linear(x, *base, bias, a, b, scaling)[0]

    def dense(x, a, b):
        return x @ weight.T + bias + (x @ a.T @ b.T) * scaling

    def penalty(function):
        leaves = [t.detach().clone().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
        first = torch.autograd.grad((function(*leaves) ** 2).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((t**2).sum() for t in first), leaves)

    for ours, expected in zip(penalty(call), penalty(dense), strict=True):
        assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_torch_func_grad_is_served():
    layer, x = quantized(), torch.randn(3, 64)
    weight, bias = layer.dequantize(), layer.bias.detach()
    ours = torch.func.grad(lambda x: (layer(x) ** 2).sum())(x)
    dense = torch.func.grad(lambda x: ((x @ weight.T + bias) ** 2).sum())(x)
    torch.testing.assert_close(ours.detach(), dense.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_and_vmap_are_refused_not_silently_wrong():
    layer, x = quantized(), torch.randn(3, 64)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(layer, (x,), (x,))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(layer)(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_module_computes():
    layer = quantized()
    traced = torch.jit.trace(layer, torch.randn(3, 64), check_trace=False)
    x = torch.randn(3, 64)
    assert torch.equal(traced(x), layer(x))


def test_a_default_device_does_not_decide_where_results_are():
    weight, x = torch.randn(24, 64), torch.randn(3, 64)
    layer = quantized()
    expected = layer(x)
    with torch.device("meta"):
        assert torch.equal(layer(x), expected)
        for fmt in ("nf4", "int8"):
            tensor = nybble.QuantTensor.quantize(weight, nybble.QuantConfig(fmt))
            assert tensor.dequantize().device.type == "cpu"


def test_a_lazy_negation_is_carried_out():
    layer, x = quantized(), torch.randn(3, 64)
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))
    negative = nybble.QuantTensor.quantize(torch._neg_view(x))
    assert torch.equal(negative.packed, nybble.QuantTensor.quantize(-x).packed)


def test_int8_sums_stay_in_range_where_the_result_does(isa):
    layer = nybble.QuantLinear.from_linear(nn.Linear(64, 8, bias=False), nybble.QuantConfig("int8"))
    with torch.no_grad():
        x = torch.full((1, 64), 2e37)  # 127 times this is beyond fp32
        exact = x.double() @ layer.dequantize(torch.float32).double().T
    assert exact.abs().max() < 3e38
    for rows in (1, 9):
        y = layer(x.expand(rows, 64).contiguous())
        assert torch.isfinite(y).all()
        assert (y.double() - exact).abs().max() <= 1e-4 * 64 * 2e37 * layer.dequantize().abs().max()


def test_lora_at_zero_is_its_base_in_fp16_even_where_x_a_leaves_fp16():
    layer = nybble.LoRALinear.from_base(quantized(), r=4, alpha=64)
    with torch.no_grad():
        layer.lora_A.fill_(30)
    x = torch.full((1, 64), 60.0, dtype=torch.float16)
    assert torch.equal(layer(x), layer.base(x))


def test_autocast_leaves_float64_alone():
    layer = quantized()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="float64"):
        layer(torch.randn(3, 64, dtype=torch.float64))
