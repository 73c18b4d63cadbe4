"""nybble.merge: the merged model computes what the adapter on its base does; resumable; misfits are refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_campaign import digest
from safetensors.torch import load_file, save_file

import nybble
from nybble import LoRAConfig, QuantConfig, QuantTensor, add_lora
from nybble.checkpoint.peft import adapted_layers
from nybble.errors import CheckpointError, PatternError

Make = Callable[..., Path]
CAMPAIGN = Path(__file__).parent / "kill_campaign.py"


def randomize(model: torch.nn.Module) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def write_adapter(base: Path, out: Path, **settings: Any) -> Path:
    model = nybble.load(base)
    add_lora(model, LoRAConfig(**{"r": 4, "alpha": 8, **settings}))
    randomize(model)
    nybble.save_adapter(model, out)
    return out


def logits(directory: Path, ids: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    model = nybble.load(directory)
    if adapter is not None:
        nybble.load_adapter(model, adapter)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.fixture(params=["plain", "nf4", "int8"])
def base(request: pytest.FixtureRequest, make: Make, tmp_path: Path) -> Path:
    source = make(dtype=torch.float32)
    if request.param == "plain":
        return source
    nybble.quantize(source, tmp_path / "base", QuantConfig(request.param))
    return tmp_path / "base"


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora, patterns, rslora": {
        "dora": True,
        "rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "some layers, head in full": {"target": ("q_proj", "down_proj"), "modules_to_save": ("lm_head", "norm")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_the_adapter_on_its_base(
    base: Path, tmp_path: Path, token_ids: torch.Tensor, kind: str
) -> None:
    adapter = write_adapter(base, tmp_path / "adapter", **KINDS[kind])
    report = nybble.merge(base, adapter, tmp_path / "out", "fp32")
    expected = logits(base, token_ids, adapter)
    merged = logits(tmp_path / "out", token_ids)
    torch.testing.assert_close(merged, expected, rtol=0, atol=3e-5 * expected.abs().max().item())
    assert not torch.allclose(merged, logits(base, token_ids), atol=1e-2)
    assert len(report.rows) == (4 if "some" in kind else 14)
    assert all(row.error is None and 0 < row.update < 1 for row in report.rows)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.filterwarnings("ignore")
def test_the_same_as_pefts_merge(make: Make, tmp_path: Path, token_ids: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    base = make(dtype=torch.float32, tied=True)
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "up_proj"])
    theirs = peft.get_peft_model(nybble.load(base), config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    merged = copy.deepcopy(theirs).eval().merge_and_unload()
    nybble.merge(base, tmp_path / "adapter", tmp_path / "out", "fp32")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in merged.state_dict().items():
        if name in ours:
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_the_head_shares(make: Make, tmp_path: Path, token_ids: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    base = make(dtype=torch.float32, tied=True)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(nybble.load(base), peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
        randomize(theirs)
        theirs.save_pretrained(tmp_path / "adapter")
    report = nybble.merge(base, tmp_path / "adapter", tmp_path / "out", "fp32")
    expected = logits(base, token_ids, tmp_path / "adapter")
    torch.testing.assert_close(
        logits(tmp_path / "out", token_ids), expected, rtol=0, atol=3e-5 * expected.abs().max().item()
    )
    assert report.notes == ["the head shared the embedding's weight and has its own now"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("to", ["nf4", "fp4", "int4", "int8"])
def test_into_a_quantized_format(make: Make, tmp_path: Path, to: str) -> None:
    source = make(dtype=torch.float32)
    nybble.quantize(source, tmp_path / "base", QuantConfig("nf4", block_size=128, double_quant=False))
    adapter = write_adapter(tmp_path / "base", tmp_path / "adapter", target="q_proj")
    report = nybble.merge(tmp_path / "base", adapter, tmp_path / "out", to)
    nybble.merge(tmp_path / "base", adapter, tmp_path / "exact", "fp32")
    exact, after = (
        load_file(tmp_path / "exact" / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    before = load_file(tmp_path / "base" / "model.safetensors")
    config = QuantConfig(to, block_size=128, double_quant=False)
    for row in report.rows:
        quantized = QuantTensor.quantize(exact[row.name], config)
        for key, value in quantized.state().items():
            assert torch.equal(after[row.name.removesuffix("weight") + key], value)
        error = (quantized.dequantize() - exact[row.name]).norm() / exact[row.name].norm()
        assert row.error == pytest.approx(error.item(), rel=1e-4)
    assert len(report.rows) == 2
    untouched = "model.layers.0.mlp.up_proj.weight"
    if to == "nf4":  # bytes that need not change do not
        assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith(untouched))
    nybble.load(tmp_path / "out")


def test_onto_the_original_weights(make: Make, tmp_path: Path, token_ids: torch.Tensor) -> None:
    source = make(dtype=torch.float32)
    nybble.quantize(source, tmp_path / "base")
    adapter = write_adapter(tmp_path / "base", tmp_path / "adapter")
    report = nybble.merge(tmp_path / "base", adapter, tmp_path / "out", "fp32", onto=source)
    expected = logits(source, token_ids, adapter)
    torch.testing.assert_close(
        logits(tmp_path / "out", token_ids), expected, rtol=0, atol=3e-5 * expected.abs().max().item()
    )
    weights = load_file(source / "model.safetensors")
    for row in report.rows:
        exact = weights[row.name]
        error = (QuantTensor.quantize(exact, QuantConfig()).dequantize() - exact).norm() / exact.norm()
        assert row.base_error == pytest.approx(error.item(), rel=1e-4)
    report.write(tmp_path / "report.json")
    assert len(json.loads((tmp_path / "report.json").read_text())["layers"]) == 14
    assert report.table().row_count == 5


def test_a_plain_base_into_nf4(make: Make, tmp_path: Path) -> None:
    source = make(dtype=torch.bfloat16)
    adapter = write_adapter(source, tmp_path / "adapter")
    nybble.merge(source, adapter, tmp_path / "out", "nf4")
    model = nybble.load(tmp_path / "out")
    assert sum(isinstance(module, nybble.QuantLinear) for module in model.modules()) == 14
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "bitsandbytes"


def test_killed_at_any_step_the_same_call_goes_on_to_the_same_bytes(make: Make, tmp_path: Path) -> None:
    nybble.quantize(make(dtype=torch.bfloat16), tmp_path / "base")
    adapter = write_adapter(tmp_path / "base", tmp_path / "adapter")
    keywords = {"base": str(tmp_path / "base"), "adapter": str(adapter), "dst": "{out}", "max_shard_size": 60_000}
    command = [sys.executable, CAMPAIGN, "nybble.checkpoint.merging:merge", json.dumps(keywords), tmp_path, 20]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["points"] == result["same"] == 20


def test_memory_and_threads_do_not_change_a_byte(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    save_file({"fc.weight": torch.randn(1501, 1000).bfloat16()}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    factors = {"lora_A": torch.randn(4, 1000) * 0.1, "lora_B": torch.randn(1501, 4) * 0.1}
    tensors = {f"base_model.model.fc.{name}.weight": value for name, value in factors.items()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    for to in ("bf16", "nf4"):
        for number, settings in enumerate([{}, {"workers": 1}, {"max_memory": 64e6, "workers": 1}]):
            nybble.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / f"{to}{number}", to, **settings)
        assert digest(tmp_path / f"{to}0") == digest(tmp_path / f"{to}1") == digest(tmp_path / f"{to}2")


def test_what_does_not_fit_is_refused(make: Make, tmp_path: Path) -> None:
    base = make(dtype=torch.float32)
    adapter = write_adapter(base, tmp_path / "adapter")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="to is 'q4_0'; allowed are bf16"):
        nybble.merge(base, adapter, out, "q4_0")
    with pytest.raises(ValueError, match="block_size and search are for a quantized result"):
        nybble.merge(base, adapter, out, "bf16", search="mse")
    with pytest.raises(CheckpointError, match="lies inside it"):
        nybble.merge(base, adapter, adapter / "out")
    small = make("small", dtype=torch.float32, intermediate_size=256)
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.\d\.mlp\.\w+' is for a weight \[.*\]; '.*' in .*small is"
    ):
        nybble.merge(small, adapter, out)
    fewer = make("fewer", dtype=torch.float32, num_hidden_layers=1)
    with pytest.raises(PatternError, match=r"'model\.layers\.1\..*': .*fewer has no weight for it"):
        nybble.merge(fewer, adapter, out)
    assert not out.exists()
    assert len(adapted_layers(nybble.load(base))) == 0


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


def test_absorb_keeps_what_the_update_does(make: Make, tmp_path: Path) -> None:
    nybble.quantize(make(dtype=torch.float32), tmp_path / "base", QuantConfig("nf4", block_size=32))
    adapter = write_adapter(tmp_path / "base", tmp_path / "adapter")
    for path in (adapter / "adapter_model.safetensors",):  # an update far below a quantization step
        save_file({n: t * (0.1 if "lora_B" in n else 1) for n, t in load_file(path).items()}, path)
    base = tmp_path / "base"
    nybble.merge(base, adapter, tmp_path / "exact", "fp32")
    nybble.merge(base, adapter, tmp_path / "nearest", "nf4")
    report = nybble.merge(base, adapter, tmp_path / "absorbed", "nf4", absorb=True)
    again = nybble.merge(base, adapter, tmp_path / "again", "nf4", absorb=True, workers=1, max_memory=80e6)
    assert digest(tmp_path / "absorbed") == digest(tmp_path / "again")
    assert report.rows == again.rows
    exact = nybble.load(tmp_path / "exact")
    factors = load_file(adapter / "adapter_model.safetensors")
    lost: dict[str, list[float]] = {"nearest": [], "absorbed": []}
    for name, values in lost.items():
        model = nybble.load(tmp_path / name)
        for row in report.rows:
            path = row.name.removesuffix(".weight")
            difference = model.get_submodule(path).dequantize(torch.float32) - exact.get_submodule(path).weight
            a, b = (factors[f"base_model.model.{path}.lora_{f}.weight"] for f in "AB")
            values.append(((difference @ a.T).norm() / (2 * b @ a @ a.T).norm()).item())
            if name == "absorbed":
                error = (difference.norm() / exact.get_submodule(path).weight.norm()).item()
                assert row.error == pytest.approx(error, rel=1e-3)
    assert sum(lost["absorbed"]) < 0.6 * sum(lost["nearest"])
    nybble.merge(base, adapter, tmp_path / "other", "int4", absorb=True)
    for settings in ({"onto": make("plain", dtype=torch.float32)}, {}):
        with pytest.raises(ValueError, match="absorb is for the dequantized weights of a quantized base"):
            nybble.merge(
                base if settings else tmp_path / "plain", adapter, tmp_path / "x", "nf4", absorb=True, **settings
            )
    with pytest.raises(ValueError, match=r"absorb is for a 4-bit result \(nf4, fp4, int4\); to is 'int8'"):
        nybble.merge(base, adapter, tmp_path / "x", "int8", absorb=True)
