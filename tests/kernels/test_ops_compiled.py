"""The operators under torch.compile, export, autocast, activation checkpointing and torch.func."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernels.ops_inputs import WEIGHTS, K, M, N
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nybble import LoRALinear, QuantLinear, ops


class Model(nn.Module):
    """LoRA over a quantized layer with a bias, a nonlinearity, LoRA over int8, a quantized layer alone."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = QuantLinear.from_linear(nn.Linear(K, 2 * K), WEIGHTS["nested"])
        second = QuantLinear.from_linear(nn.Linear(2 * K, K, bias=False), WEIGHTS["int8"])
        self.up = LoRALinear.from_base(first, 4, 8.0, dropout)
        self.down = LoRALinear.from_base(second, 2, 4.0, rslora=True)
        self.out = QuantLinear.from_linear(nn.Linear(K, N), WEIGHTS["plain"])
        with torch.no_grad():
            for layer in (self.up, self.down):
                layer.lora_B.normal_(std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(torch.relu(self.up(x))))


def results(model: Any, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_forward_and_backward_equal_eager(dynamic: bool) -> None:
    # The "aot_eager" backend traces forward and backward in full, without a C++ compiler and its minute.
    model = Model()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 12):
        x = torch.randn(2, rows, K)
        for a, b in zip(results(model, x, trained(model)), results(compiled, x, trained(model)), strict=True):
            assert torch.equal(a, b)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch warns of itself when inductor is imported
def test_compiled_by_inductor_equals_eager() -> None:
    model = Model()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(12, K)
    for a, b in zip(results(model, x, trained(model)), results(compiled, x, trained(model)), strict=True):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()


def test_exported_model_equals_eager() -> None:
    model = nn.Sequential(Model().out, nn.ReLU())
    x = torch.randn(M, K)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert any("nybble.linear" in str(node.target) for node in program.graph.nodes)
    for rows in (M, 11):
        x = torch.randn(rows, K)
        assert torch.equal(program.module()(x), model(x))


def test_autocast_computes_in_its_dtype() -> None:
    model, x = Model(), torch.randn(12, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        assert ops.linear(x.requires_grad_(), model.out.packed_weight()).dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in trained(model))
    weight = model.out.packed_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ops.linear(x, weight)
    assert torch.equal(cast, ops.linear(x.bfloat16(), weight))


def test_autocast_gives_the_same_as_casting_by_hand_under_compile() -> None:
    model, x = Model(), torch.randn(12, K)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), compiled(x))
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(reentrant: bool, dropout: float) -> None:
    model, x = Model(dropout), torch.randn(12, K)
    torch.manual_seed(5)
    plain = results(model, x, trained(model))
    torch.manual_seed(5)
    again = x.clone().requires_grad_()
    y = checkpoint(model, again, use_reentrant=reentrant)
    y.square().sum().backward()
    assert torch.equal(y, plain[0])
    for gradient, leaf in zip(plain[1:], [again, *trained(model)], strict=True):
        assert torch.equal(gradient, leaf.grad)


def test_functional_call_takes_other_parameters() -> None:
    model, x = Model(), torch.randn(M, K)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in trained(other):
            p.mul_(2.0)
    changed = {name: p for name, p in other.named_parameters() if p.requires_grad}
    assert torch.equal(torch.func.functional_call(model, changed, (x,)), other(x))
    assert not torch.equal(model(x), other(x))


def test_inference_mode_and_no_grad() -> None:
    model, x = Model(), torch.randn(M, K)
    expected = model(x).detach()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
