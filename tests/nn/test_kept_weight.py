"""What a QuantLinear keeps from call to call never outlives the tensors that it was made of."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from nn.layers import CONFIGS, quant_linear
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nybble import LoRALinear, QuantConfig, QuantLinear, _core
from nybble.backends import BoundWeight, cpu
from nybble.backends.weight import handle_of
from nybble.errors import LayoutError

TENSORS = ("weight", "absmax", "codebook", "nested_absmax", "nested_map", "nested_offset")


@pytest.fixture(params=["nf4", "nf4-plain", "int8"])
def config(request: pytest.FixtureRequest) -> QuantConfig:
    return CONFIGS[request.param]


def outputs(layer: QuantLinear, x: Tensor) -> list[Tensor]:
    """Forward without and with gradient, and grad_input."""
    with torch.no_grad():
        plain = layer(x)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return [plain, y.detach(), dx]


def replace_tensors(layer: QuantLinear, other: QuantLinear) -> None:
    for name in TENSORS:
        setattr(layer, name, getattr(other, name))


def replace_in_the_dicts(layer: QuantLinear, other: QuantLinear) -> None:
    layer._parameters.update(other._parameters)
    layer._buffers.update(other._buffers)


def assign_data(layer: QuantLinear, other: QuantLinear) -> None:
    for name in TENSORS:
        own = getattr(layer, name)
        if own is not None:
            own.data = getattr(other, name).detach().clone()


def share_memory(layer: QuantLinear, other: QuantLinear) -> None:
    layer.load_state_dict(other.state_dict())
    layer(torch.randn(1, 70))
    layer.share_memory()


CHANGES: dict[str, Callable[[QuantLinear, QuantLinear], object]] = {
    "parameters replaced": replace_tensors,
    "parameters replaced in the module's dicts": replace_in_the_dicts,
    "data assigned": assign_data,
    "in place": lambda layer, other: [
        getattr(layer, name).copy_(getattr(other, name)) for name in TENSORS if getattr(layer, name) is not None
    ],
    "load_state_dict": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "load_state_dict assign": lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
    "load_quant_tensor": lambda layer, other: layer.load_quant_tensor(other.quant_tensor()),
    "share_weight": lambda layer, other: layer.share_weight(other),
    "share_memory": share_memory,
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_change_of_the_tensors_is_seen_by_the_next_call(config: QuantConfig, change: str) -> None:
    layer, other, x = quant_linear(config, bias=False), quant_linear(config, bias=False, seed=1), torch.randn(3, 70)
    before, expected = outputs(layer, x), outputs(quant_linear(config, bias=False, seed=1), x)
    with torch.no_grad():
        CHANGES[change](layer, other)
    gc.collect()
    _scribble = [torch.full((350, 1), 255, dtype=torch.uint8) for _ in range(50)]  # takes freed memory
    for one, same, old in zip(outputs(layer, x), expected, before, strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, old)


@pytest.mark.parametrize("name", TENSORS)
def test_each_tensor_is_watched(name: str) -> None:
    x = torch.randn(3, 70)
    for move in ("data", "object"):
        layer = quant_linear(bias=False)
        before = outputs(layer, x)
        value = torch.zeros_like(getattr(layer, name).detach())
        if move == "data":
            getattr(layer, name).data = value
        elif isinstance(getattr(layer, name), nn.Parameter):
            setattr(layer, name, nn.Parameter(value, requires_grad=False))
        else:
            setattr(layer, name, value)
        fresh = QuantLinear.from_quant_tensor(layer.quant_tensor())
        for one, same, old in zip(outputs(layer, x), outputs(fresh, x), before, strict=True):
            assert torch.equal(one, same)
            assert not torch.equal(one, old)


def test_the_backward_sees_a_weight_that_moved_since_the_forward(config: QuantConfig) -> None:
    layer, x = quant_linear(config), torch.randn(3, 70, requires_grad=True)
    expected = outputs(layer, x.detach())[2]
    y = layer(x)
    for name in TENSORS:
        tensor = getattr(layer, name)
        if tensor is not None:
            tensor.data = tensor.data.clone()
    gc.collect()
    _scribble = [torch.full((350, 1), 255, dtype=torch.uint8) for _ in range(50)]
    assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0], expected)


def test_a_weight_that_no_longer_fits_is_refused() -> None:
    layer, x = quant_linear(), torch.randn(1, 70)
    layer(x)
    layer.weight.data = layer.weight.data[:-1].clone()
    with pytest.raises(LayoutError, match=r"packed has 349 elements.* 350"):
        layer(x)
    layer = quant_linear()
    layer(x)
    layer.absmax.untyped_storage().resize_(0)  # what sharding does between uses
    with pytest.raises((LayoutError, ValueError), match="absmax"):
        layer(x)


def test_a_new_configuration_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, seen = quant_linear(), torch.randn(1, 70), []
    linear = _core.linear

    def spy(*args: object) -> None:
        seen.append((args[1], args[2]))
        linear(*args)

    monkeypatch.setattr(cpu._core, "linear", spy)
    for compute in (None, "int8", None):
        layer.config = replace(layer.config, compute=compute)
        layer(x)
    # Told to the kernel in the forward only.
    layer.config = replace(layer.config, compute="int8")
    layer(x.requires_grad_()).sum().backward()
    assert seen == [(False, 0), (False, 1), (False, 0), (False, 1), (True, 0)]


def test_casts_and_moves(config: QuantConfig) -> None:
    layer, x = quant_linear(config), torch.randn(3, 70)
    expected = layer(x)
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.float()
    layer.bias.data = quant_linear(config).bias.data
    assert torch.equal(layer(x), expected)
    layer.to("meta")
    assert layer(x.to("meta")).is_meta
    with pytest.raises(LayoutError, match="packed is on meta, but the input is on cpu"):
        layer(x)


def test_nothing_is_copied_pickled_or_saved(config: QuantConfig) -> None:
    layer, x = quant_linear(config), torch.randn(3, 70)
    expected = layer(x)
    assert isinstance(layer.operands()[0], BoundWeight)
    assert layer.operands()[0] is layer.operands()[0]
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert "_kept" in vars(layer)
        assert "_kept" not in vars(other)
        assert torch.equal(other(x), expected)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
    assert not torch.equal(other(x), layer(x))
    assert torch.equal(layer(x), expected)


def test_moving_a_layer_frees_what_was_there() -> None:
    layer = quant_linear()
    layer(torch.randn(1, 70))
    old = weakref.ref(layer.weight)
    layer.to("meta")
    gc.collect()
    assert old() is None


def test_a_parametrized_tensor_is_computed_anew() -> None:
    class Flip(nn.Module):
        def forward(self, codes: Tensor) -> Tensor:
            return codes ^ 255

    layer, x = quant_linear(bias=False), torch.randn(3, 70)
    plain = layer(x)
    parametrize.register_parametrization(layer, "weight", Flip(), unsafe=True)
    flipped = quant_linear(bias=False)
    with torch.no_grad():
        flipped.weight.copy_(flipped.weight ^ 255)
    assert torch.equal(layer(x), flipped(x))
    assert not torch.equal(layer(x), plain)


def test_threads_may_share_a_layer_from_its_first_call_on(config: QuantConfig) -> None:
    for _ in range(10):
        layer, x = quant_linear(config), torch.randn(3, 70)
        expected = quant_linear(config)(x)

        def work(layer: QuantLinear = layer, x: Tensor = x) -> list[Tensor]:
            return [layer(x) for _ in range(20)]

        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(work) for _ in range(4)]
            assert all(torch.equal(y, expected) for future in futures for y in future.result())


def test_lora_sees_its_bases_change() -> None:
    layer, other, x = quant_linear(), quant_linear(seed=1), torch.randn(3, 70)
    lora = LoRALinear.from_base(layer, 2, 4.0)
    lora(x)
    layer.share_weight(other)
    assert torch.equal(lora(x), layer(x))


def test_the_core_names_a_wrong_call() -> None:
    weight = handle_of(quant_linear().packed_weight(), _core)
    with pytest.raises(TypeError, match="linear takes 16 arguments, got 1"):
        _core.linear(weight)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"weight must be a Weight of this module"):
        _core.linear(3, *[0] * 15)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _core.linear(weight, *["x"] * 15)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads is out of range or null: got 0"):
        _core.linear(weight, *[0] * 15)
