"""LoRALinear over quantized and plain layers against a reimplementation in plain torch."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from nn.layers import CONFIGS, DTYPES, linear, quant_linear
from torch import Tensor, nn
from torch.nn import functional

from nybble import LoRAConfig, LoRALinear, QuantLinear, reference

R, ALPHA = 4, 8.0
BASES = {
    "quantized": quant_linear,
    "int8": lambda **o: quant_linear(CONFIGS["int8"], **o),
    "plain": lambda **o: linear(**o),
}


@pytest.fixture(params=list(BASES))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def trained(layer: LoRALinear, seed: int = 1) -> LoRALinear:
    """B as it may be after training: not zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
    return layer


def weight_of(base: QuantLinear | nn.Linear) -> Tensor:
    return base.dequantize(torch.float32) if isinstance(base, QuantLinear) else base.weight.detach()


# ---- start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_new_layer_gives_exactly_the_output_of_its_base(
    isa: str, kind: str, dtype: torch.dtype, factors: torch.dtype, bias: bool
) -> None:
    base = BASES[kind](bias=bias, dtype=dtype)
    for dropout in (0.0, 0.5):
        layer = LoRALinear.from_base(base, R, ALPHA, dropout, dtype=factors)
        for m in (1, 12):
            x = torch.randn(m, 70).to(dtype)
            for train in (True, False):
                assert torch.equal(layer.train(train)(x), base(x))
            x.requires_grad_()
            y = layer(x)
            assert torch.equal(y, base(x))
            assert y.dtype == dtype


def test_only_a_and_b_train(kind: str) -> None:
    base = BASES[kind]()
    layer = LoRALinear.from_base(base, R, ALPHA)
    assert layer.base is base
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        "adapters.default.lora_A",
        "adapters.default.lora_B",
    ]
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((R, 70), (10, R))
    assert (layer.in_features, layer.out_features) == (70, 10)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    layer(torch.randn(3, 70)).sum().backward()
    assert layer.lora_B.grad is not None and bool(layer.lora_B.grad.any())
    assert not bool(layer.lora_A.grad.any())  # B is zero
    assert all(p.grad is None for p in base.parameters())


def test_the_mode_of_the_base_is_kept() -> None:
    assert not LoRALinear.from_base(quant_linear().eval(), R, ALPHA).training
    assert LoRALinear.from_base(quant_linear().train(), R, ALPHA).training


def test_scaling() -> None:
    assert LoRALinear.from_base(linear(), 4, 8.0).scaling == 2.0
    assert LoRALinear.from_base(linear(), 4, 8.0, rslora=True).scaling == 4.0
    assert LoRALinear.from_base(linear(), 1, 3.0).scaling == 3.0


def test_initialisation_of_a() -> None:
    wide = linear(n=2, k=4096)
    torch.manual_seed(0)
    kaiming = LoRALinear.from_base(wide, 8, ALPHA).lora_A
    limit = 1 / math.sqrt(4096)  # kaiming_uniform with a = sqrt 5 over fan_in inputs
    assert kaiming.abs().max() <= limit
    # The mean of n uniform values has a standard deviation of limit / sqrt(3 n): five of them.
    assert abs(kaiming.mean().item()) <= 5 * limit / math.sqrt(3 * kaiming.numel())
    gaussian = LoRALinear.from_base(wide, 8, ALPHA, init="gaussian").lora_A
    # The sample's standard deviation has one of sigma / sqrt(2 n).
    assert abs(gaussian.std().item() - 1 / 8) <= 5 / 8 / math.sqrt(2 * gaussian.numel())
    orthogonal = LoRALinear.from_base(wide, 8, ALPHA, init="orthogonal", dtype=torch.bfloat16).lora_A.float()
    # Rows of unit length, rounded to bf16: each of the products' terms is off by 2^-8 of itself.
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(8), rtol=0, atol=2.0**-7)
    layer = trained(LoRALinear.from_base(wide, 8, ALPHA))
    layer.reset_parameters()
    assert not bool(layer.lora_B.any())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"r": 0}, ValueError, "r is 0; the rank must be 1 or more"),
        ({"r": -3}, ValueError, "r is -3"),
        ({"r": 2.0}, TypeError, r"r is 2\.0"),
        ({"r": True}, TypeError, "r is True"),
        ({"alpha": 0.0}, ValueError, r"alpha is 0\.0"),
        ({"alpha": -1.0}, ValueError, r"alpha is -1\.0"),
        ({"alpha": float("nan")}, ValueError, "alpha is nan"),
        ({"alpha": float("inf")}, ValueError, "alpha is inf"),
        ({"dropout": 1.0}, ValueError, r"dropout is 1\.0; it must be in \[0, 1\)"),
        ({"dropout": -0.1}, ValueError, r"dropout is -0\.1"),
        ({"dropout": float("nan")}, ValueError, "dropout is nan"),
        ({"init": "zeros"}, ValueError, "init is 'zeros'; allowed are kaiming, gaussian, orthogonal"),
        ({"dtype": torch.int8}, TypeError, r"dtype is torch\.int8"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        LoRALinear.from_base(linear(), **{"r": R, "alpha": ALPHA, **arguments})
    if "dtype" not in arguments:
        with pytest.raises(error, match=match):
            LoRAConfig(**arguments)


def test_a_base_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"base is a Conv1d; a QuantLinear or an nn\.Linear"):
        LoRALinear.from_base(nn.Conv1d(1, 1, 1), R, ALPHA)
    with pytest.raises(TypeError, match="base is a LoRALinear"):
        LoRALinear.from_base(LoRALinear.from_base(linear(), R, ALPHA), R, ALPHA)


# ---- computing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("m", [1, 12])
def test_output_and_gradients_are_those_of_the_sum_of_both_weights(isa: str, kind: str, m: int, rslora: bool) -> None:
    layer = trained(LoRALinear.from_base(BASES[kind](), R, ALPHA, rslora=rslora))
    x = torch.randn(m, 70, requires_grad=True)
    g = torch.randn(m, 10)
    actual = [layer(x), *torch.autograd.grad(layer(x), (x, layer.lora_A, layer.lora_B), g)]

    def compute(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, g: Tensor) -> list[Tensor]:
        x, a, b = (t.detach().double().requires_grad_() for t in (x, a, b))
        y = x @ (w.double() + layer.scaling * b @ a).t() + bias.double()
        return [y, *torch.autograd.grad(y, (x, a, b), g.double())]

    parts = (x, weight_of(layer.base), layer.base.bias, layer.lora_A, layer.lora_B, g)
    exact, sizes = compute(*parts), compute(*(p.abs() for p in parts))
    # No term of the chained fp32 sums passes through more than in + out + r + rows operations and a few roundings.
    terms = 70 + 10 + R + m + 8
    for one, other, size in zip(actual, exact, sizes, strict=True):
        assert bool(((one.double() - other).abs() <= 1.01 * terms * 2.0**-24 * size).all())


def test_merging_adds_delta_weight(isa: str, kind: str) -> None:
    layer = trained(LoRALinear.from_base(BASES[kind](), R, ALPHA, rslora=True))
    delta = layer.delta_weight()
    assert (delta.dtype, delta.shape, delta.requires_grad) == (torch.float32, (10, 70), False)
    torch.testing.assert_close(delta, 4.0 * layer.lora_B.detach() @ layer.lora_A.detach())
    x = torch.randn(12, 70)
    merged = functional.linear(x, weight_of(layer.base) + delta, layer.base.bias)
    torch.testing.assert_close(layer(x), merged)


def test_factors_of_another_dtype_are_used_in_the_inputs(isa: str) -> None:
    for dtype in DTYPES:
        layer = trained(LoRALinear.from_base(quant_linear(dtype=dtype), R, ALPHA, dtype=torch.bfloat16))
        other = LoRALinear.from_base(layer.base, R, ALPHA, dtype=torch.float32)
        other.load_state_dict(layer.state_dict())
        x = torch.randn(12, 70).to(dtype)
        assert torch.equal(layer(x), other(x))
        assert layer(x).dtype == dtype


def test_fp16_side_products_do_not_overflow() -> None:
    # x A^T is beyond fp16's 65504, scaling times it times B is not.
    layer = LoRALinear.from_base(quant_linear(k=64, dtype=torch.float16), R, 4.0)
    with torch.no_grad():
        layer.lora_A.fill_(40.0)
        layer.lora_B.fill_(1e-4)
    x = torch.full((12, 64), 50.0, dtype=torch.float16)
    assert 40.0 * 50.0 * 64 > 65504
    assert bool(layer(x).isfinite().all())


# ---- dropout ---------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """LoRA with dropout in plain torch (arXiv 2106.09685): the update's input is dropped, the base's is not."""

    def __init__(self, layer: LoRALinear) -> None:
        super().__init__()
        self.weight, self.bias = weight_of(layer.base), layer.base.bias
        self.a = nn.Parameter(layer.lora_A.detach().clone())
        self.b = nn.Parameter(layer.lora_B.detach().clone())
        self.scaling, self.rate = layer.scaling, layer.dropout

    def forward(self, x: Tensor) -> Tensor:
        side = functional.dropout(x, self.rate, self.training) @ self.a.t() * self.scaling
        return reference.linear(x, self.weight, self.bias) + side @ self.b.t()


def test_dropout_is_that_of_plain_torch_with_the_same_seed(isa: str, kind: str) -> None:
    layer = trained(LoRALinear.from_base(BASES[kind](), R, ALPHA, dropout=0.4)).train()
    plain = Plain(layer).train()
    x = torch.randn(12, 70)
    results = []
    for module, parameters in ((layer, (layer.lora_A, layer.lora_B)), (plain, (plain.a, plain.b))):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(11)
        y = module(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), (leaf, *parameters))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert not torch.equal(layer(x), layer(x))


def test_dropout_is_off_in_eval(kind: str) -> None:
    layer = trained(LoRALinear.from_base(BASES[kind](), R, ALPHA, dropout=0.4)).eval()
    without = copy.deepcopy(layer)
    without.adapter().dropout = 0.0
    x = torch.randn(12, 70)
    assert torch.equal(layer(x), without(x))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    # A = B = 1, x = 1, base 0: each output is the kept share of the 1000 inputs over 1 - p.
    base = linear(n=1, k=1000)
    nn.init.zeros_(base.weight)
    nn.init.zeros_(base.bias)
    for quantized in (False, True):
        layer = LoRALinear.from_base(QuantLinear.from_linear(base) if quantized else base, 1, 1.0, dropout=0.25)
        nn.init.ones_(layer.lora_A)
        nn.init.ones_(layer.lora_B)
        torch.manual_seed(0)
        kept = layer(torch.ones(200, 1000)).detach() * 0.75 / 1000
        # Of 200000 independent draws: five standard deviations of the mean, sqrt(p (1 - p) / n).
        assert abs(kept.mean().item() - 0.75) <= 5 * math.sqrt(0.25 * 0.75 / 200_000)
        assert kept.std() > 0


def test_dropout_under_autocast(kind: str) -> None:
    layer = trained(LoRALinear.from_base(BASES[kind](), R, ALPHA, dropout=0.4)).train()
    x = torch.randn(12, 70, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


# ---- a module like others --------------------------------------------------------------------------------------------


def test_state_dict_round_trip(kind: str) -> None:
    layer = trained(LoRALinear.from_base(BASES[kind](), R, ALPHA))
    assert {"adapters.default.lora_A", "adapters.default.lora_B", "base.weight", "base.bias"} <= set(layer.state_dict())
    other = LoRALinear.from_base(BASES[kind](seed=5), R, ALPHA)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(12, 70)
    assert torch.equal(other(x), layer(x))


def test_copies_compute_the_same(kind: str) -> None:
    layer = trained(LoRALinear.from_base(BASES[kind](), R, ALPHA))
    x = torch.randn(12, 70)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.lora_A is not layer.lora_A


def test_meta_layers_compute_shapes(kind: str) -> None:
    base = BASES[kind]().to("meta")
    for dropout in (0.0, 0.2):
        layer = LoRALinear.from_base(base, R, ALPHA, dropout)
        assert layer.lora_A.is_meta
        assert layer(torch.empty(3, 70, device="meta")).shape == (3, 10)


def test_repr_shows_the_rank() -> None:
    text = repr(LoRALinear.from_base(quant_linear(), R, ALPHA, 0.1, rslora=True))
    assert "r=4, alpha=8.0, dropout=0.1, rslora" in text
