"""`compute="int8"`: what it means, its stated error, and how a layer's configuration carries it to the kernel."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn.layers import CONFIGS, DTYPES, linear, quant_linear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nybble import LoRALinear, QuantConfig, QuantLinear, explain, ops, quantize_, reference
from nybble.backends import portable
from nybble.errors import LayoutError

INT8 = QuantConfig(compute="int8")


class Calls(TorchDispatchMode):
    """The names and arguments of nybble's operators that go by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "nybble":
            self.seen.append(
                (func._schema.name, {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)})
            )
        return func(*args, **(kwargs or {}))


# ---- what it means ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(1, 90), st.integers(-30, 30), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_an_activation_is_off_by_at_most_half_a_step(
    rows: int, k: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    # With the identity as the weight, the result is the rounded activation itself. Half a step is absmax / 254; scale,
    # quotient and product are rounded to fp32 (of up to 127 steps, 2^-24 each, 2^-149 where denormal), the result to
    # dtype.
    torch.manual_seed(seed)
    x = (torch.randn(rows, k).double() * 10.0**exponent).clamp(-6e4, 6e4).to(dtype)
    y = reference.linear_int8_activations(x, torch.eye(k))
    absmax = x.double().abs().amax(1, keepdim=True)
    unit = torch.finfo(dtype).eps / 2
    bound = absmax / 254 * (1 + 4 * 127 * 2.0**-23) + 127 * 2.0**-148 + unit * absmax * 1.01
    bound = bound + torch.finfo(dtype).smallest_normal * unit * 2
    assert bool(((y.double() - x.double()).abs() <= bound).all())


def test_a_row_is_rounded_by_its_own_scale() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.4], [0.0, 0.0, 0.0, 0.0], [-1.27, 1.0, 0.0, 0.005]])
    y = reference.linear_int8_activations(x, torch.eye(4))
    expected = torch.tensor([[127.0, 0.0, 2.0, -2.0], [0.0, 0.0, 0.0, 0.0], [-1.27, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
    assert bool(reference.linear_int8_activations(torch.tensor([[1.0, torch.inf]]), torch.eye(2)).isnan().all())
    assert reference.linear_int8_activations(torch.empty(3, 0), torch.empty(2, 0)).tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("config", list(CONFIGS))
def test_portable_devices_compute_the_reference(config: str) -> None:
    tensor = quant_linear(CONFIGS[config]).quant_tensor()
    weight = tensor.packed_weight()._replace(compute=1)
    x, bias, side, side_weight = torch.randn(2, 3, 70), torch.randn(10), torch.randn(2, 3, 4), torch.randn(10, 4)
    expected = reference.linear_int8_activations(x, tensor.dequantize(torch.float32), bias, side, side_weight)
    assert torch.equal(portable.linear(x, weight, bias, side, side_weight), expected)
    assert not torch.equal(portable.linear(x, weight._replace(compute=0), bias, side, side_weight), expected)
    found = portable.explain_linear(8, 8, 1, torch.float32, False, False, 1)
    assert "int8 activations" in found["compute"]
    assert portable.explain_linear(8, 8, 1, torch.float32, False, True, 1)["compute"] == "float32"


# ---- from the configuration to the kernel ----------------------------------------------------------------------------


def test_the_configuration_reaches_the_operator() -> None:
    x = torch.randn(3, 70)
    for config, code in ((None, 0), (INT8, 1)):
        layer = quant_linear(config)
        assert layer.packed_weight().compute == code
        lora = LoRALinear.from_base(quant_linear(config), 2, 4.0)
        with Calls() as calls:
            layer(x)
            lora(x)
        assert [(name, arguments["compute"]) for name, arguments in calls.seen] == [
            ("nybble::linear", code),
            ("nybble::lora_linear", code),
        ]


def test_patterns_override_it() -> None:
    model = nn.Sequential(linear(70, 70), linear(10, 70))
    quantize_(model, QuantConfig(overrides={"1": {"compute": "int8"}}))
    assert [layer.config.compute for layer in model] == [None, "int8"]


def test_it_stays_with_the_layer_and_out_of_its_state() -> None:
    for name, config in CONFIGS.items():
        layer = quant_linear(replace(config, compute="int8"))
        plain = quant_linear(config)
        assert all(
            torch.equal(a, b) for a, b in zip(layer.state_dict().values(), plain.state_dict().values(), strict=True)
        )
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert copied.config.compute == "int8"
        # A layer that adopts another format keeps how it computes; one that loads such a state does not take it over.
        layer.load_state_dict(quant_linear(CONFIGS["int8" if config.is_4bit else "nf4"]).state_dict())
        assert layer.config.compute == "int8", name
        plain.load_state_dict(layer.state_dict())
        assert plain.config.compute is None
        assert QuantLinear.from_quant_tensor(layer.quant_tensor()).config.compute is None


def test_repr_and_explain_say_it() -> None:
    layer = quant_linear(INT8)
    assert "compute=int8" in repr(layer)
    assert "compute" not in repr(quant_linear())
    assert explain(layer, m=3) == explain((10, 70), m=3, compute="int8")
    assert explain(layer, m=3, grad_input=True) == explain((10, 70), m=3, grad_input=True)
    with pytest.raises(ValueError, match="compute is 'int3'"):
        explain((4, 4), compute="int3")


def test_an_unknown_code_is_refused() -> None:
    weight = quant_linear().packed_weight()._replace(compute=2)
    with pytest.raises(LayoutError, match="compute is 2; allowed are 0"):
        ops.linear(torch.randn(1, 70), weight)


@pytest.mark.parametrize("registered", [False, True], ids=["function", "operator"])
def test_the_gradient_is_that_of_the_unrounded_product(registered: bool) -> None:
    def gradients(config: QuantConfig | None) -> list[Tensor]:
        weight = quant_linear(config).packed_weight()
        torch.manual_seed(1)
        x, bias, a, b = (torch.randn(*s).requires_grad_() for s in ((5, 70), (10,), (2, 70), (10, 2)))
        if registered:
            plain = torch.ops.nybble.linear(x, *weight, bias, None, None)
            lora = torch.ops.nybble.lora_linear(x, *weight, bias, a, b, 2.0)[0]
        else:
            plain, lora = ops.linear(x, weight, bias), ops.lora_linear(x, weight, bias, a, b, 2.0)
        g = torch.randn(5, 10)
        return [*torch.autograd.grad(plain, (x, bias), g), *torch.autograd.grad(lora, (x, bias, a, b), g)]

    for one, other in zip(gradients(INT8), gradients(None), strict=True):
        assert torch.equal(one, other)


def test_compiled_equals_eager() -> None:
    layer, x = quant_linear(INT8), torch.randn(4, 70)
    torch.compiler.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    torch.compiler.reset()
