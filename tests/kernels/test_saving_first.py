"""Under activation checkpointing a layer's last product is not computed again, and nothing else changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nybble import LoRALinear, QuantConfig, QuantLinear
from nybble.operators import bodies
from nybble.recomputation import saving_first


class Layer(nn.Module):
    """x + down(silu(up(x))), as a decoder layer ends."""

    def __init__(self, quantized: bool, dtype: torch.dtype, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)

        def adapted(inputs: int, outputs: int) -> LoRALinear:
            linear: Any = nn.Linear(inputs, outputs, dtype=dtype)
            linear.requires_grad_(False)
            linear = QuantLinear.from_linear(linear, QuantConfig()) if quantized else linear
            layer = LoRALinear.from_base(linear, r=4, alpha=8, dropout=dropout)
            nn.init.normal_(layer.lora_B)
            return layer

        self.up, self.down = adapted(64, 96), adapted(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


def gradients(layer: Layer, dtype: torch.dtype, *, first: bool, checkpointed: bool = True) -> list[Tensor]:
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    torch.manual_seed(2)
    with saving_first() if first else nullcontext():
        y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        trained = [p for p in layer.parameters() if p.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The output sizes of the products that are computed, in turn."""
    seen: list[int] = []
    linear = bodies.linear_body

    def counted(x: Tensor, weight: Any, *args: Any) -> Tensor:
        seen.append(weight.out_features)
        return linear(x, weight, *args)

    monkeypatch.setattr(bodies, "linear_body", counted)
    yield seen


@pytest.mark.parametrize("first", (False, True))
def test_the_last_product_is_computed_once(products: list[int], first: bool) -> None:
    gradients(Layer(True, torch.float32), torch.float32, first=first)
    assert products == ([96, 64, 96] if first else [96, 64, 96, 64])


@pytest.mark.parametrize("checkpointed", (False, True))
@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("quantized", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_no_bit_changes(dtype: torch.dtype, quantized: bool, dropout: float, checkpointed: bool) -> None:
    layer = Layer(quantized, dtype, dropout)
    expected = gradients(layer, dtype, first=False, checkpointed=False)
    found = gradients(layer, dtype, first=True, checkpointed=checkpointed)
    assert all(map(torch.equal, found, expected))


def test_second_derivatives_and_a_graph_that_is_kept() -> None:
    layer = Layer(True, torch.float32)
    results = []
    for first in (False, True):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with saving_first() if first else nullcontext():
            y = layer(x)
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            trained = [x, layer.up.lora_A, layer.down.lora_B]
            again = torch.autograd.grad(y.sum(), x, retain_graph=True)
            results.append([dx.detach(), *again, *torch.autograd.grad(dx.square().sum(), trained)])
    assert all(map(torch.equal, *results))


def test_layers_inputs_do_not_outlive_their_gradients() -> None:
    """What autograd keeps of a layer goes when the layer's gradient is there, not when the last one's is."""
    layers = [Layer(True, torch.float32) for _ in range(4)]
    inputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    with saving_first():
        y = torch.randn(3, 64).requires_grad_()
        for layer in layers:
            y = y * 1.0
            inputs.append(weakref.ref(y))
            y.register_hook(lambda _: alive.append(sum(ref() is not None for ref in inputs)))
            y = checkpoint(layer, y, use_reentrant=False)
        y.sum().backward()
    assert alive == [3, 2, 1, 0]


def test_backward_twice_is_an_error_unless_the_graph_is_kept() -> None:
    with saving_first():
        y = Layer(True, torch.float32)(torch.randn(3, 64).requires_grad_()).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_a_frozen_adapter_needs_no_gradient() -> None:
    layer = Layer(True, torch.float32)
    layer.requires_grad_(False)
    x = torch.randn(3, 64).requires_grad_()
    with saving_first():
        y = layer(x)
        assert torch.equal(y, layer(x.detach()))
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.autograd.grad(layer(x).sum(), x)[0])
