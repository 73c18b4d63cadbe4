"""nybble.merge: the merged model computes what the adapter on its base does; formats; resumable."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_on_disk import Make, logits, randomize, write_adapter, write_factors, write_weights
from kill_campaign import digest
from safetensors.torch import load_file, save_file

import nybble
from nybble import QuantConfig, QuantTensor
from nybble.errors import CheckpointError

CAMPAIGN = Path(__file__).parent / "kill_campaign.py"


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


def test_a_base_without_the_prefix_of_its_class(make: Make, tmp_path: Path, token_ids: torch.Tensor) -> None:
    base = make(dtype=torch.float32)
    adapter = write_adapter(base, tmp_path / "adapter")
    expected = logits(base, token_ids, adapter)
    path = base / "model.safetensors"
    save_file({name.removeprefix("model."): value for name, value in load_file(path).items()}, path, {"format": "pt"})
    nybble.merge(base, adapter, tmp_path / "out", "fp32")
    merged = logits(tmp_path / "out", token_ids)
    torch.testing.assert_close(merged, expected, rtol=0, atol=3e-5 * expected.abs().max().item())


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
