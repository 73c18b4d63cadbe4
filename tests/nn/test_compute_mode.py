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
from nybble.backends.weight import decoded_columns
from nybble.errors import FormatError, LayoutError

INT8 = QuantConfig(compute="int8")
OUTLIERS = QuantConfig(compute="int8", outlier_threshold=2.5)


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
    for threshold in (0.0, 2.5):
        expected = reference.linear_int8_activations(
            x, tensor.dequantize(torch.float32), bias, side, side_weight, threshold
        )
        weight = weight._replace(outlier_threshold=threshold)
        assert torch.equal(portable.linear(x, weight, bias, side, side_weight), expected)
    plain = weight._replace(compute=0, outlier_threshold=0.0)
    assert not torch.equal(portable.linear(x, plain, bias, side, side_weight), expected)
    found = portable.explain_linear(8, 8, 1, torch.float32, False, False, 1)
    assert "int8 activations" in found["compute"]
    assert portable.explain_linear(8, 8, 1, torch.float32, False, True, 1)["compute"] == "float32"


# ---- outlier columns -------------------------------------------------------------------------------------------------


def test_outlier_columns_are_multiplied_as_they_are() -> None:
    # Column 1 reaches 6 in the second row alone, column 3 with both signs; 5.99 does not. What is left is rounded by a
    # scale that the outliers do not set: 2.54 / 127 = 0.02.
    x = torch.tensor([[2.54, 0.123, 0.03, -6.0], [1.27, 100.017, 0.005, 7.001], [5.99, 0.0, 0.0, 0.0]])
    y = reference.linear_int8_activations(x, torch.eye(4), outlier_threshold=6.0)
    expected = torch.tensor([[2.54, 0.123, 0.04, -6.0], [1.27, 100.017, 0.0, 7.001], [5.99, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
    assert reference.outlier_columns(x, 6.0).tolist() == [1, 3]
    for threshold in (None, 0.0, 1000.0):
        assert reference.outlier_columns(x, threshold) is None
        again = reference.linear_int8_activations(x, torch.eye(4), outlier_threshold=threshold)
        assert torch.equal(again, reference.linear_int8_activations(x, torch.eye(4)))
    assert reference.outlier_columns(torch.empty(0, 4), 6.0) is None
    assert reference.outlier_columns(torch.empty(3, 0), 6.0) is None


@given(st.floats(0.5, 5.0), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_an_activation_beside_outliers_is_off_by_half_a_smaller_step(
    threshold: float, dtype: torch.dtype, seed: int
) -> None:
    # As above, with the largest magnitude below the threshold.
    torch.manual_seed(seed)
    x = torch.randn(5, 40).to(dtype)
    x[:, [3, 17]] *= 30
    y = reference.linear_int8_activations(x, torch.eye(40), outlier_threshold=threshold).double()
    outlier = (x.float().abs() >= threshold).any(0)
    assert torch.equal(y[:, outlier], x.double()[:, outlier])
    absmax = x.double().abs().masked_fill(outlier, 0.0).amax(1, keepdim=True)
    bound = absmax / 254 * (1 + 4 * 127 * 2.0**-23) + torch.finfo(dtype).eps / 2 * absmax * 1.01
    assert bool(((y - x.double()).abs()[:, ~outlier] <= bound).all())


def test_an_infinity_in_an_outlier_column_stays_in_its_outputs() -> None:
    x = torch.tensor([[torch.inf, 1.0], [2.0, 1.0], [torch.nan, 1.0]])
    weight = torch.tensor([[1.0, 1.0], [-2.0, 1.0]])
    y = reference.linear_int8_activations(x, weight, outlier_threshold=6.0)
    torch.testing.assert_close(
        y, torch.tensor([[torch.inf, -torch.inf], [3.0, -3.0], [torch.nan, torch.nan]]), equal_nan=True
    )


@pytest.mark.parametrize("config", list(CONFIGS))
def test_columns_are_decoded_as_the_whole_weight_is(config: str) -> None:
    for k in (70, 33):
        tensor = quant_linear(CONFIGS[config], k=k).quant_tensor()
        columns = torch.tensor([0, 1, 5, k - 2, k - 1])
        found = decoded_columns(tensor.packed_weight(), columns)
        assert torch.equal(found, tensor.dequantize(torch.float32)[:, columns])


# ---- from the configuration to the kernel ----------------------------------------------------------------------------


def test_the_configuration_reaches_the_operator() -> None:
    x = torch.randn(3, 70)
    for config, code, threshold in ((None, 0, 0.0), (INT8, 1, 0.0), (OUTLIERS, 1, 2.5)):
        layer = quant_linear(config)
        assert layer.packed_weight()[-2:] == (code, threshold)
        lora = LoRALinear.from_base(quant_linear(config), 2, 4.0)
        with Calls() as calls:
            layer(x)
            lora(x)
        found = [(name, arguments["compute"], arguments["outlier_threshold"]) for name, arguments in calls.seen]
        assert found == [("nybble::linear", code, threshold), ("nybble::lora_linear", code, threshold)]


def test_patterns_override_it() -> None:
    model = nn.Sequential(linear(70, 70), linear(10, 70))
    quantize_(model, QuantConfig(overrides={"1": {"compute": "int8"}}))
    assert [layer.config.compute for layer in model] == [None, "int8"]
    config = QuantConfig(
        compute="int8", outlier_threshold=6, overrides={"0": {"compute": None}, "1": {"outlier_threshold": 3.0}}
    )
    assert [config.for_module(name).outlier_threshold for name in "012"] == [None, 3.0, 6.0]


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), float("inf"), 1e39, True, "6"])
def test_a_threshold_must_be_a_number_above_zero(threshold: object) -> None:
    with pytest.raises(FormatError, match=r"outlier_threshold is .*number above 0"):
        QuantConfig(compute="int8", outlier_threshold=threshold)


def test_a_threshold_needs_int8() -> None:
    with pytest.raises(FormatError, match="compute='int8'"):
        QuantConfig(outlier_threshold=6.0)
    weight = quant_linear().packed_weight()
    for bad in (weight._replace(outlier_threshold=6.0), weight._replace(compute=1, outlier_threshold=-1.0)):
        with pytest.raises(LayoutError, match="outlier_threshold is"):
            ops.linear(torch.randn(1, 70), bad)


def test_it_stays_with_the_layer_and_out_of_its_state() -> None:
    for name, config in CONFIGS.items():
        layer = quant_linear(replace(config, compute="int8", outlier_threshold=6.0))
        plain = quant_linear(config)
        assert all(
            torch.equal(a, b) for a, b in zip(layer.state_dict().values(), plain.state_dict().values(), strict=True)
        )
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert (copied.config.compute, copied.config.outlier_threshold) == ("int8", 6.0)
        # A layer that adopts another format keeps how it computes; one that loads such a state does not take it over.
        layer.load_state_dict(quant_linear(CONFIGS["int8" if config.is_4bit else "nf4"]).state_dict())
        assert (layer.config.compute, layer.config.outlier_threshold) == ("int8", 6.0), name
        plain.load_state_dict(layer.state_dict())
        assert plain.config.compute is None
        assert QuantLinear.from_quant_tensor(layer.quant_tensor()).config.compute is None


def test_repr_and_explain_say_it() -> None:
    layer = quant_linear(INT8)
    assert "compute=int8" in repr(layer)
    assert "compute=int8, outlier_threshold=2.5" in repr(quant_linear(OUTLIERS))
    assert "compute" not in repr(quant_linear())
    assert "threshold" not in repr(layer)
    assert "reach 2.5" in explain(quant_linear(OUTLIERS), m=3).reason
    assert explain(quant_linear(OUTLIERS), m=3) == explain((10, 70), m=3, compute="int8", outlier_threshold=2.5)
    assert explain(quant_linear(OUTLIERS), m=3, grad_input=True) == explain(layer, m=3, grad_input=True)
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

    for one, two, other in zip(gradients(INT8), gradients(OUTLIERS), gradients(None), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(two, other)


def test_compiled_equals_eager() -> None:
    for config in (INT8, OUTLIERS):
        layer, x = quant_linear(config), torch.randn(4, 70)
        torch.compiler.reset()
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    torch.compiler.reset()
