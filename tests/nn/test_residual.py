"""LoRA that starts from what quantization lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import nybble
from nybble import LoRAConfig, QuantConfig, QuantLinear, add_lora
from nybble.errors import NonFiniteError, PatternError
from nybble.nn import init_from_residual


def model_of(rows: int, columns: int, config: QuantConfig, **lora: object) -> tuple[nn.Sequential, torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    model = nn.Sequential(nn.Linear(columns, rows))
    model[0].weight.data = weight.clone()
    nybble.quantize_(model, config)
    add_lora(model, LoRAConfig(**lora))  # type: ignore[arg-type]
    return model, weight


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 200),
    columns=st.integers(2, 200),
    r=st.integers(1, 24),
    rslora=st.booleans(),
    format=st.sampled_from(["nf4", "fp4", "int4", "int8"]),
    iterations=st.integers(1, 4),
)
def test_loftq_takes_the_best_of_its_rank(
    rows: int, columns: int, r: int, rslora: bool, format: str, iterations: int
) -> None:
    model, weight = model_of(rows, columns, QuantConfig(format), r=r, alpha=7, rslora=rslora)
    bytes_before = model[0].base.weight.clone()
    lost = weight - model[0].base.dequantize()
    row = init_from_residual(model, {"0.weight": weight}, "loftq", iterations)["0"]
    base = model[0].base.dequantize()
    assert row.before == pytest.approx((lost.norm() / weight.norm()).item(), rel=1e-4, abs=1e-6)
    error = weight - base - model[0].delta_weight()
    assert row.after == pytest.approx((error.norm() / weight.norm()).item(), rel=1e-3, abs=1e-6)
    if iterations == 1:
        assert torch.equal(model[0].base.weight, bytes_before)
        # Eckart-Young: what is left is the smaller singular values.
        rest = torch.linalg.svdvals(lost.double())[r:].square().sum().sqrt()
        assert error.norm().item() == pytest.approx(rest.item(), rel=1e-3, abs=1e-4)
        assert row.after <= row.before * (1 + 1e-5)


def test_more_iterations_of_loftq_lose_less() -> None:
    errors = []
    for iterations in (1, 5):
        model, weight = model_of(256, 256, QuantConfig("nf4"), r=16, alpha=16)
        errors.append(init_from_residual(model, {"0.weight": weight}, iterations=iterations)["0"].after)
    assert errors[1] < errors[0]


def test_pissa_moves_the_leading_directions_into_the_update(tmp_path: object) -> None:
    torch.manual_seed(0)
    strong = torch.randn(128, 4) @ torch.randn(4, 96) * 3
    weight = strong + torch.randn(128, 96)
    model = nn.Sequential(nn.Linear(96, 128, bias=False))
    model[0].weight.data = weight.clone()
    nybble.quantize_(model, QuantConfig("nf4", block_size=32))
    add_lora(model, LoRAConfig(r=4, alpha=8))
    row = init_from_residual(model, {"0.weight": weight}, "pissa")["0"]
    assert row.after < 0.5 * row.before  # the strong part is kept exactly, the rest has smaller blocks' scales
    assert isinstance(model[0].base, QuantLinear)
    assert model[0].delta_weight().norm() > model[0].base.dequantize().norm()
    x = torch.randn(5, 96)
    assert (model(x) - x @ weight.T).norm() / (x @ weight.T).norm() < 2 * row.after


def test_large_matrices_are_decomposed_approximately_and_always_alike() -> None:
    torch.manual_seed(0)
    found = []
    for _ in range(2):
        torch.rand(3)  # wherever the generator stands
        model, weight = model_of(1100, 1050, QuantConfig("nf4"), r=8, alpha=8)
        lost = weight - model[0].base.dequantize()
        found.append(init_from_residual(model, {"0.weight": weight})["0"].after)
    best = torch.linalg.svdvals(lost)[8:].square().sum().sqrt() / weight.norm()
    assert found[0] == found[1]
    assert best.item() <= found[0] < best.item() * 1.005


def test_bad_arguments() -> None:
    model, weight = model_of(64, 64, QuantConfig(), r=4)
    with pytest.raises(ValueError, match="method is 'svd'; allowed are loftq, pissa"):
        init_from_residual(model, {"0.weight": weight}, "svd")
    with pytest.raises(ValueError, match="iterations is 0"):
        init_from_residual(model, {"0.weight": weight}, iterations=0)
    with pytest.raises(PatternError, match=r"there is no weight '0\.weight'"):
        init_from_residual(model, {})
    with pytest.raises(ValueError, match=r"0\.weight has shape \[64, 32\]; the layer needs \[64, 64\]"):
        init_from_residual(model, {"0.weight": weight[:, :32]})
    with pytest.raises(ValueError, match="no LoRALinear over a QuantLinear"):
        init_from_residual(nn.Linear(2, 2), {})


@pytest.mark.parametrize("method", ["loftq", "pissa"])
def test_originals_that_are_not_finite_are_named_and_change_nothing(tmp_path: Path, method: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    weights = {f"{i}.weight": model[i].weight.detach().clone() for i in range(2)}
    nybble.quantize_(model, QuantConfig())
    add_lora(model, LoRAConfig(r=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights["1.weight"][2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"original: 1\.weight: the value at flat index 131"):
        init_from_residual(model, weights, method)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"original: 1\.weight \(.*model\.safetensors\): the value at"):
        init_from_residual(model, tmp_path, method)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
