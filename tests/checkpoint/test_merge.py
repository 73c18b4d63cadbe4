"""nybble.merge: the merged model computes what the adapter on its base does; resumable; misfits are refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_campaign import digest
from safetensors.torch import load_file, save_file

import nybble
from nybble import LoRAConfig, QuantConfig, QuantTensor, add_lora
from nybble.checkpoint.absorb import orthonormal
from nybble.checkpoint.peft import adapted_layers
from nybble.errors import CheckpointError, NonFiniteError, PatternError

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


def write_factors(out: Path, settings: dict[str, Any] | None = None, **layers: tuple[torch.Tensor, ...]) -> Path:
    """An adapter of (A, B) by path, `__` for a dot."""
    out.mkdir()
    tensors = {}
    for name, factors in layers.items():
        for part, values in zip(("A", "B"), factors, strict=True):
            tensors[f"base_model.model.{name.replace('__', '.')}.lora_{part}.weight"] = values.clone()
    save_file(tensors, out / "adapter_model.safetensors")
    r = next(iter(layers.values()))[0].shape[0]
    (out / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": r, **(settings or {})})
    )
    return out


def write_weights(out: Path, **tensors: torch.Tensor) -> Path:
    out.mkdir()
    save_file({name.replace("__", "."): value for name, value in tensors.items()}, out / "model.safetensors")
    return out


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


ONES = (torch.ones(1, 8), torch.ones(8, 1))


def test_a_name_loses_or_gains_only_the_base_models_prefix(tmp_path: Path) -> None:
    base = write_weights(tmp_path / "base", fc__weight=torch.zeros(8, 8), b__fc__weight=torch.zeros(8, 8))
    for number, layers in enumerate([{"a__fc": ONES}, {"a__fc": ONES, "c__fc": ONES}]):
        with pytest.raises(PatternError, match=r"'a\.fc': .*base has no weight for it"):
            nybble.merge(base, write_factors(tmp_path / f"a{number}", **layers), tmp_path / "x", "fp32")
    for number, layers in enumerate([{"model__fc": ONES}, {"model__fc": ONES, "model__b__fc": ONES}]):
        adapter = write_factors(tmp_path / f"b{number}", **layers)
        assert len(nybble.merge(base, adapter, tmp_path / f"out{number}", "fp32").rows) == number + 1
    assert load_file(tmp_path / "out0" / "model.safetensors")["fc.weight"].sum() == 64
    inner = write_weights(tmp_path / "inner", model__fc__weight=torch.zeros(8, 8), model__d__weight=torch.zeros(8, 8))
    nybble.merge(inner, write_factors(tmp_path / "c", fc=ONES, d=ONES), tmp_path / "added", "fp32")
    both = write_factors(tmp_path / "d", fc=ONES, model__fc=ONES)
    with pytest.raises(CheckpointError, match=r"'fc' and 'model\.fc' would both change 'fc\.weight'"):
        nybble.merge(base, both, tmp_path / "x", "fp32")
    # One way for all: `fc` would gain what `model.d` has.
    with pytest.raises(PatternError, match=r"'(fc|e)': .* has no weight for it"):
        nybble.merge(inner, write_factors(tmp_path / "e", fc=ONES, e=ONES), tmp_path / "x", "fp32")
    assert not (tmp_path / "x").exists()


def test_a_base_without_the_prefix_of_its_class(make: Make, tmp_path: Path, token_ids: torch.Tensor) -> None:
    base = make(dtype=torch.float32)
    adapter = write_adapter(base, tmp_path / "adapter")
    expected = logits(base, token_ids, adapter)
    path = base / "model.safetensors"
    save_file({name.removeprefix("model."): value for name, value in load_file(path).items()}, path, {"format": "pt"})
    nybble.merge(base, adapter, tmp_path / "out", "fp32")
    merged = logits(tmp_path / "out", token_ids)
    torch.testing.assert_close(merged, expected, rtol=0, atol=3e-5 * expected.abs().max().item())


def test_a_base_of_another_method_is_refused(tmp_path: Path) -> None:
    base = write_weights(
        tmp_path / "base", fc__weight=torch.zeros(8, 8), p__qweight=torch.zeros(4, 4, dtype=torch.int32)
    )
    (base / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    adapter = write_factors(tmp_path / "adapter", fc=ONES)
    nybble.quantize(write_weights(tmp_path / "plain", fc__weight=torch.randn(8, 8)), tmp_path / "nf4")
    for call in (
        lambda: nybble.merge(base, adapter, tmp_path / "x"),
        lambda: nybble.unmerge(base, adapter, tmp_path / "x"),
        lambda: nybble.merge(tmp_path / "nf4", adapter, tmp_path / "x", onto=base),
    ):
        with pytest.raises(
            CheckpointError, match=r"base.config\.json: the checkpoint is already quantized \(by gptq\)"
        ):
            call()
    (tmp_path / "nf4" / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(CheckpointError, match="quantized by 'awq', whose layout nybble does not read"):
        nybble.merge(tmp_path / "nf4", adapter, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1], ids=["A", "B"])
def test_adapters_that_are_not_finite(tmp_path: Path, value: float, part: int) -> None:
    base = write_weights(tmp_path / "base", fc__weight=torch.zeros(8, 8))
    factors = [factor.clone() for factor in ONES]
    factors[part].view(-1)[3] = value
    adapter = write_factors(tmp_path / "adapter", fc=tuple(factors))
    name = rf"fc\.lora_{'AB'[part]}\.weight \(.*adapter_model\.safetensors\): the value at flat index 3"
    for to in ("fp32", "bf16", "nf4"):
        with pytest.raises(NonFiniteError, match=name):
            nybble.merge(base, adapter, tmp_path / "x", to)
    for rank in (None, 1):
        with pytest.raises(NonFiniteError, match=name):
            nybble.combine_adapters([(adapter, 1.0)], tmp_path / "x", rank)
    large = write_factors(tmp_path / "large", fc=(ONES[0] * 3e38, ONES[1] * 3e38))
    with pytest.raises(NonFiniteError, match=r"fc\.weight \(.*base.model\.safetensors\): the merged value"):
        nybble.merge(base, large, tmp_path / "x", "fp32")
    tensors = {
        "base_model.model.fc.weight": torch.full((8, 8), value),
        **load_file(adapter / "adapter_model.safetensors"),
    }
    tensors = {name: tensor for name, tensor in tensors.items() if "lora" not in name}
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "modules_to_save": ["fc"]}')
    with pytest.raises(NonFiniteError, match=r"fc\.weight \(.*adapter_model"):
        nybble.merge(base, adapter, tmp_path / "x", "fp32")
    assert not (tmp_path / "x").exists()


def test_the_figures_do_not_depend_on_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1501, 1000) * torch.arange(1, 1502)[:, None]  # rows of very different norms
    base = write_weights(tmp_path / "base", fc__weight=weight.bfloat16())
    a, b = torch.randn(4, 1000), torch.randn(1501, 4)
    adapter = write_factors(tmp_path / "adapter", fc=(a, b))
    exact = weight.bfloat16().float() + b @ a
    update = ((b @ a).norm() / exact.norm()).item()
    for to in ("bf16", "nf4"):
        found = []
        for number, memory in enumerate((None, 200e6, 90e6, 60e6)):
            out = tmp_path / f"{to}{number}"
            found.append(nybble.merge(base, adapter, out, to, workers=1, max_memory=memory).rows)
        assert all(rows == found[0] for rows in found)
        assert found[0][0].update == pytest.approx(update, rel=1e-4)


def test_config_json_says_the_settings_really_used(make: Make, tmp_path: Path) -> None:
    source = make(dtype=torch.float32)
    config = QuantConfig(
        "nf4", block_size=32, double_quant=False, skip=("lm_head", "k_proj"),
        overrides={"down_proj": {"block_size": 128}, "v_proj": None},
    )  # fmt: skip
    nybble.quantize(source, tmp_path / "base", config)
    adapter = write_adapter(tmp_path / "base", tmp_path / "adapter", target=("q_proj", "down_proj"))
    nybble.merge(tmp_path / "base", adapter, tmp_path / "out", "fp4")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stored = QuantConfig.from_dict(block["nybble"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name in load_file(source / "model.safetensors"):
        module = name.removesuffix(".weight")
        state = {k.removeprefix(f"{module}."): v for k, v in tensors.items() if k.startswith(f"{module}.weight")}
        setting = stored.for_module(module)
        if "proj" in name and len(state) > 1:
            found = QuantTensor.from_state(state)
            assert setting is not None
            assert (setting.format, setting.block_size, setting.double_quant) == (
                "fp4",
                found.block_size,
                found.is_nested,
            )
        elif "proj" in name or "head" in name:
            assert setting is None
    assert (stored.block_size, stored.double_quant) == (32, False)
    nybble.merge(source, adapter, tmp_path / "plain", "nf4", block_size=128)
    block = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert block["nybble"]["block_size"] == 128


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (True, {"target_modules": ["lm_head", "q_proj"]}),
        (True, {"target_modules": ["lm_head", "embed_tokens"]}),
        (False, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
        (True, {"target_modules": ["embed_tokens"], "use_dora": True}),
        (True, {"target_modules": ["lm_head"], "use_dora": True}),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ],
    ids=["tied head", "tied head and table", "DoRA table", "DoRA tied table", "DoRA tied head", "table in full"],
)
def test_heads_and_tables_as_peft_computes_them(
    make: Make, tmp_path: Path, token_ids: torch.Tensor, tied: bool, settings: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    base = make(dtype=torch.float32, tied=tied)
    theirs = peft.get_peft_model(nybble.load(base), peft.LoraConfig(r=2, **settings))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs.eval()(input_ids=token_ids).logits
    assert (expected - logits(base, token_ids)).abs().max() > 1e-2
    nybble.merge(base, tmp_path / "adapter", tmp_path / "out", "fp32")
    merged = logits(tmp_path / "out", token_ids)
    torch.testing.assert_close(merged, expected, rtol=0, atol=3e-5 * expected.abs().max().item())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    nybble.quantize(base, tmp_path / "q")
    nybble.merge(tmp_path / "q", tmp_path / "adapter", tmp_path / "nf4", "nf4")
    nybble.load(tmp_path / "nf4")


def test_an_fp8_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = {name: torch.randn(64, 128).to(torch.float8_e4m3fn) for name in ("fc__weight", "fd__weight")}
    scales = {f"{name}_scale_inv": torch.rand(1, 1) + 0.5 for name in values}
    base = write_weights(tmp_path / "base", **values, **scales, norm__weight=torch.ones(64))
    (base / "config.json").write_text(
        '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}'
    )
    a, b = torch.randn(2, 128), torch.randn(64, 2)
    adapter = write_factors(tmp_path / "adapter", fc=(a, b))
    exact = {name.replace("__", "."): value.float() * scales[f"{name}_scale_inv"] for name, value in values.items()}
    exact["fc.weight"] += b @ a
    assert len(nybble.merge(base, adapter, tmp_path / "fp32", "fp32").rows) == 1
    merged = load_file(tmp_path / "fp32" / "model.safetensors")
    assert merged.keys() == {*exact, "norm.weight"}
    for name, value in exact.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "fp32" / "config.json").read_text())
    nybble.merge(base, adapter, tmp_path / "nf4", "nf4")
    packed = load_file(tmp_path / "nf4" / "model.safetensors")
    for name in exact:
        state = {key.removeprefix(name[:3]): value for key, value in packed.items() if key.startswith(name)}
        expected = QuantTensor.quantize(merged[name], QuantConfig())
        assert torch.equal(QuantTensor.from_state(state).packed, expected.packed)
    with pytest.raises(CheckpointError, match="its weights are quantized"):
        nybble.unmerge(base, adapter, tmp_path / "x")


@pytest.mark.parametrize("shape", [(5, 3000), (40, 40), (30, 17), (1, 9)])
def test_orthonormal_rows_of_the_same_span(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    a = torch.randn(shape) * torch.logspace(0, -3, shape[0])[:, None]
    rows = orthonormal(a.clone())
    rank = int(torch.linalg.matrix_rank(a.double(), rtol=1e-6))
    assert rows.shape == (rank, shape[1])
    identity = torch.eye(rank)
    torch.testing.assert_close(rows @ rows.T, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(a @ rows.T @ rows, a, rtol=0, atol=1e-5 * a.norm().item())
    assert orthonormal(torch.zeros(shape)).shape == (0, shape[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM")
def test_absorbing_a_high_rank_keeps_to_the_least_memory_that_it_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nybble.quantize(write_weights(tmp_path / "w", fc__weight=torch.randn(64, 8192).bfloat16()), tmp_path / "base")
    adapter = write_factors(tmp_path / "adapter", fc=(torch.randn(512, 8192), torch.randn(64, 512)))
    program = """
        import sys, torch, nybble
        from nybble.checkpoint.absorb import orthonormal
        base, adapter, out = sys.argv[1:]
        nybble.QuantTensor.quantize(torch.randn(64, 64), nybble.QuantConfig()).dequantize()
        orthonormal(torch.randn(4, 64))  # what the library of linear algebra takes once
        try:
            nybble.merge(base, adapter, out, "nf4", absorb=True, max_memory=1e6, workers=1)
        except nybble.errors.CheckpointError as error:
            least = int(str(error).rpartition("at least ")[2].replace(",", ""))

        def peak():
            return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10

        before = peak()
        nybble.merge(base, adapter, out, "nf4", absorb=True, max_memory=least, workers=1)
        print(peak() - before, least)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), tmp_path / "base", adapter, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used, least = map(int, done.stdout.split())
    assert used < least < 250e6
