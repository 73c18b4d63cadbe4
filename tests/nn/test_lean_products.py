"""Linear layers in 16 bits, computed in fp32, are what autocast computes but for the rounding of its sums."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nybble.backends import products
from nybble.nn import lean_products as module
from nybble.nn.lean_products import lean_products


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for bf16, whatever this one has."""

    def slow(dtype: torch.dtype) -> bool:
        return dtype in (torch.bfloat16, torch.float16)

    monkeypatch.setattr(products, "emulated", slow)
    monkeypatch.setattr(module, "emulated", slow)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """The dtypes of the products that were computed in fp32."""
    seen: list[torch.dtype] = []
    original = module.product

    def counted(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        seen.append(left.dtype)
        return original(left, right, dtype)

    monkeypatch.setattr(module, "product", counted)
    yield seen


def gradients(layer: nn.Module, x: Tensor, towards: Tensor, autocast: bool) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(leaf)
    y.backward(towards.to(y.dtype))
    return [y.detach(), *(t.grad for t in (leaf, *layer.parameters()) if t.grad is not None)]


@pytest.mark.parametrize(
    ("weight", "input_", "autocast"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, False),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_results_and_gradients(
    weight: torch.dtype, input_: torch.dtype, autocast: bool, bias: bool, calls: list[torch.dtype]
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).to(weight)
    x, towards = torch.randn(2, 5, 24).to(input_), torch.randn(2, 5, 40)
    expected = gradients(layer, x, towards, autocast)
    assert not calls
    with lean_products():
        actual = gradients(layer, x, towards, autocast)
    assert len(calls) == 3
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


def test_what_it_does_not_take_is_torchs(calls: list[torch.dtype]) -> None:
    x = torch.randn(3, 8)
    with lean_products():
        assert torch.equal(F.linear(x, x), x @ x.t())
        assert torch.equal(F.linear(x.double(), x.double()), x.double() @ x.double().t())
        F.linear(x[0].bfloat16(), x.bfloat16())  # a vector
        F.linear(x.bfloat16(), x[0].bfloat16())
        with pytest.raises(RuntimeError):
            F.linear(x.bfloat16(), x)  # two dtypes, no autocast
        assert not calls
        with pytest.raises(ValueError, match=r"shapes \[3, 8\] and \[9, 3\]"):
            F.linear(x.bfloat16(), torch.randn(3, 9).bfloat16())
        assert F.linear(x.bfloat16()[:0], x.bfloat16()).shape == (0, 3)
        assert F.linear(x.bfloat16()[None, :, :0], x.bfloat16()[:, :0]).eq(0).all()


def test_layers_that_are_computed_again_in_the_backward_pass(calls: list[torch.dtype]) -> None:
    """A frozen layer between others: the second computation must save what the first saved."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)
    ).bfloat16()
    x = torch.randn(3, 8).bfloat16().requires_grad_()
    results = []
    with lean_products():
        for run in (layers, lambda x: checkpoint(layers, x, use_reentrant=False)):
            calls.clear()
            layers.zero_grad()
            run(x).sum().backward()
            results.append([p.grad for p in layers.parameters() if p.grad is not None])
        assert len(calls) == 3 + 3 + 5  # forward, again, gradients
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and len(results[0]) == 4


def test_contexts_in_each_other_and_afterwards() -> None:
    own = F.linear
    with lean_products():
        ours = F.linear
        with lean_products():
            assert F.linear is ours
        assert F.linear is ours is not own
    assert F.linear is own
    with pytest.raises(KeyError), lean_products():
        raise KeyError
    assert F.linear is own


def test_a_frozen_layer_computes_no_gradient_of_its_own(calls: list[torch.dtype]) -> None:
    layer = nn.Linear(8, 8).bfloat16().requires_grad_(False)
    x = torch.randn(3, 8).bfloat16().requires_grad_()
    with lean_products():
        layer(x).sum().backward()
    assert len(calls) == 2 and layer.weight.grad is None


def test_few_rows_without_gradients_are_left_to_torch(calls: list[torch.dtype]) -> None:
    layer = nn.Linear(16, 24, bias=False).to(torch.bfloat16)
    x = torch.randn(2, 4, 16).to(torch.bfloat16)
    with lean_products():
        layer(x[:, :3])  # with gradients: its backward pass has as few rows, but must not be torch's
        assert len(calls) == 1
        with torch.no_grad():
            assert torch.equal(layer(x[:, :3]), module._torchs(x[:, :3], layer.weight))
            assert len(calls) == 1
            layer(x)
        assert len(calls) == 2


@pytest.mark.parametrize("trained", [True, False])
def test_the_input_of_a_frozen_weight_is_not_kept(trained: bool) -> None:
    layer = nn.Linear(16, 24, bias=False).to(torch.bfloat16).requires_grad_(trained)
    x = torch.randn(9, 16, dtype=torch.bfloat16, requires_grad=True)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with lean_products(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum().backward()
    assert kept == ([x.data_ptr()] if trained else []) + [layer.weight.data_ptr()]
    assert x.grad is not None
