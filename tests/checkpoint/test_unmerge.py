"""nybble.unmerge, and sums of adapters: what of a merge can be taken back, and what adds up to one adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters_on_disk import Make, write_adapter
from safetensors.torch import load_file

import nybble
from nybble.checkpoint.peft import adapted_layers
from nybble.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerging_gives_the_base_back_up_to_rounding(make: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    base = make(dtype=dtype)
    adapter = write_adapter(base, tmp_path / "adapter")
    nybble.merge(base, adapter, tmp_path / "merged", "bf16" if dtype == torch.bfloat16 else "fp32")
    nybble.unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        # Rounded once merged and once unmerged, each by half a unit in the last place of the larger.
        scale = torch.maximum(value.abs(), merged[name].abs()).float()
        assert ((after[name].float() - value.float()).abs() <= 2 * torch.finfo(dtype).eps * scale + 1e-7).all()
    dora = write_adapter(base, tmp_path / "dora", dora=True)
    with pytest.raises(CheckpointError, match="DoRA overwrites what was there"):
        nybble.unmerge(tmp_path / "merged", dora, tmp_path / "x")
    nybble.quantize(base, tmp_path / "q")
    with pytest.raises(CheckpointError, match="its weights are quantized"):
        nybble.unmerge(tmp_path / "q", adapter, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_weighted_sums_of_adapters(make: Make, tmp_path: Path, token_ids: torch.Tensor) -> None:
    base = make(dtype=torch.float32)
    first = write_adapter(base, tmp_path / "first", r=3)
    second = write_adapter(base, tmp_path / "second", r=2, rslora=True, target=("q_proj", "up_proj"))
    deltas = {}
    for directory, weight in ((first, 0.75), (second, -0.5)):
        model = nybble.load(base)
        nybble.load_adapter(model, directory)
        for path, layer in adapted_layers(model).items():
            deltas[path] = deltas.get(path, 0) + weight * layer.delta_weight()
    assert set(nybble.combine_adapters([(first, 0.75), (second, -0.5)], tmp_path / "sum").values()) == {0.0}
    model = nybble.load(base)
    nybble.load_adapter(model, tmp_path / "sum")
    assert {layer.r for layer in adapted_layers(model).values()} == {3, 5}
    for path, layer in adapted_layers(model).items():
        torch.testing.assert_close(layer.delta_weight(), deltas[path], rtol=1e-4, atol=1e-6)
    errors = nybble.combine_adapters([(first, 0.75), (second, -0.5)], tmp_path / "cut", rank=2)
    model = nybble.load(base)
    nybble.load_adapter(model, tmp_path / "cut")
    for path, layer in adapted_layers(model).items():
        singular = torch.linalg.svdvals(deltas[path].double())
        best = (singular[2:].square().sum() / singular.square().sum()).sqrt().item()
        error = ((layer.delta_weight() - deltas[path]).norm() / deltas[path].norm()).item()
        assert errors[path] == pytest.approx(best, abs=1e-6) == pytest.approx(error, abs=1e-4)
    with pytest.raises(ValueError, match="rank is 0"):
        nybble.combine_adapters([(first, 1.0)], tmp_path / "x", rank=0)
    with pytest.raises(CheckpointError, match="DoRA cannot be added up"):
        nybble.combine_adapters([(write_adapter(base, tmp_path / "dora", dora=True), 1.0)], tmp_path / "x")
