"""Mixtures whose experts are one parameter of three dimensions: quantized on disk, packed in memory."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nybble
from nybble import QuantConfig, QuantTensor
from nybble.errors import CheckpointError
from nybble.nn import count_parameters
from nybble.nn.experts import DecodedOnUse, packed_parameters

transformers = pytest.importorskip("transformers")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=96, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.1,
        layer_types=["full_attention", "full_attention"], pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


@pytest.mark.filterwarnings("ignore")
def test_experts_are_quantized_and_computed_with(source: Path, tmp_path: Path) -> None:
    before = load_file(source / "model.safetensors")
    names = [name for name, value in before.items() if value.ndim == 3]
    assert len(names) == 4
    report = nybble.quantize(source, tmp_path / "q")
    assert set(names) < {row.name for row in report.tensors}
    model = nybble.load(tmp_path / "q")
    reference = transformers.GptOssForCausalLM.from_pretrained(source)
    for name, module in list(model.named_modules()):
        if isinstance(module, nybble.QuantLinear):
            reference.get_submodule(name).weight.data = module.dequantize()
    for name in names:
        reference.get_parameter(name).data = QuantTensor.quantize(before[name], QuantConfig()).dequantize()
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected, ours = reference.eval()(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    owner, _, leaf = names[0].rpartition(".")
    packed = model.get_submodule(owner).parametrizations[leaf].original
    assert packed.dtype == torch.uint8 and packed.numel() == before[names[0]].numel() // 2
    with pytest.raises(CheckpointError, match="already quantized"):
        nybble.quantize(tmp_path / "q", tmp_path / "again")


@pytest.mark.filterwarnings("ignore")
def test_a_shape_that_does_not_fit(source: Path, tmp_path: Path) -> None:
    nybble.quantize(source, tmp_path / "q")
    path = tmp_path / "q" / "model.safetensors"
    values = {name: value.clone() for name, value in load_file(path).items()}
    name = next(name for name in values if "experts" in name and ".quant_state." in name)
    text = bytes(values[name].tolist()).replace(b"[4, ", b"[2, 2, ")
    values[name] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(values, path)
    with pytest.raises(CheckpointError, match=r"has shape \[2, 2, .*\], the model wants \[4, "):
        nybble.load(tmp_path / "q")


IDS = torch.arange(20).reshape(2, 10)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def packed_count(model: torch.nn.Module) -> int:
    return sum(len(packed_parameters(module)) for module in model.modules())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig("int4", double_quant=False)], ids=["nested", "flat"])
def test_from_pretrained_and_save_pretrained(source: Path, tmp_path: Path, config: QuantConfig) -> None:
    nybble.quantize(source, tmp_path / "q", config, max_shard_size=60_000)
    ours = nybble.load(tmp_path / "q")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert packed_count(theirs) == packed_count(ours) == 4
    assert torch.equal(logits(theirs), logits(ours))
    files = {n: t for p in sorted((tmp_path / "q").glob("*.safetensors")) for n, t in load_file(p).items()}
    for number, model in enumerate((theirs, ours, copy.deepcopy(ours))):
        out = tmp_path / f"saved{number}"
        model.save_pretrained(out)
        after = load_file(out / "model.safetensors")
        assert after.keys() == files.keys()
        assert all(torch.equal(after[name], value) for name, value in files.items())
        assert torch.equal(logits(nybble.load(out)), logits(ours))
        assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(out)), logits(ours))


@pytest.mark.filterwarnings("ignore")
def test_casting_casts_what_is_decoded_and_no_scale(source: Path, tmp_path: Path) -> None:
    nybble.quantize(source, tmp_path / "q")
    model = nybble.load(tmp_path / "q")
    before = {name: value.clone() for name, value in model.state_dict().items() if "experts" in name}
    exact = model.model.layers[0].mlp.experts.gate_up_proj
    model.to(torch.bfloat16)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.endswith("bias"))
    decoded = model.model.layers[0].mlp.experts.gate_up_proj
    assert decoded.dtype == torch.bfloat16 and torch.equal(decoded, exact.bfloat16())
    assert logits(model).isfinite().all()
    assert torch.equal(model.float().model.layers[0].mlp.experts.gate_up_proj, exact)


@pytest.mark.filterwarnings("ignore")
def test_a_forward_decodes_each_parameter_once_and_keeps_none(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nybble.quantize(source, tmp_path / "q")
    model = nybble.load(tmp_path / "q")
    model.config._experts_implementation = "eager"  # a loop that reads the parameter for each expert
    decoded = []
    original = DecodedOnUse.quant_tensor
    monkeypatch.setattr(DecodedOnUse, "quant_tensor", lambda self, packed: decoded.append(1) or original(self, packed))
    model(input_ids=IDS)
    assert len(decoded) == 4
    monkeypatch.setattr(DecodedOnUse, "dtype", property(lambda self: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        model(input_ids=IDS)
    decoders = [d for module in model.modules() for d in packed_parameters(module).values()]
    assert all(not decoder._kept for decoder in decoders)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_have_the_files_names(source: Path, tmp_path: Path, assign: bool) -> None:
    nybble.quantize(source, tmp_path / "q")
    model = nybble.load(tmp_path / "q")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = copy.deepcopy(model)
    leaf = other.model.layers[0].mlp.experts.parametrizations.gate_up_proj
    leaf.original.data.zero_()
    leaf[0].absmax.zero_()
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(state, assign=assign)
    assert torch.equal(logits(other), logits(model))
    name = next(name for name in state if name.endswith("gate_up_proj"))
    with pytest.raises(RuntimeError, match=r"gate_up_proj: missing .*gate_up_proj\.absmax"):
        other.load_state_dict({key: value for key, value in state.items() if key != f"{name}.absmax"})
    plain = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert count_parameters(model) == count_parameters(plain)


class Experts(torch.nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(*shape))
        self.bias = torch.nn.Parameter(torch.zeros(shape[0]))


def test_load_into_places_packed_experts(tmp_path: Path) -> None:
    values = {"m.experts.w": torch.randn(2, 33, 65), "m.experts.bias": torch.ones(2)}
    save_file(values, tmp_path / "w.safetensors")
    nybble.quantize(tmp_path / "w.safetensors", tmp_path / "q")
    expected = QuantTensor.quantize(values["m.experts.w"], QuantConfig()).dequantize()

    def module(*shape: int) -> torch.nn.Module:
        return torch.nn.ModuleDict({"m": torch.nn.ModuleDict({"experts": Experts(*shape)})})

    made = module(2, 33, 65)
    for _ in range(2):  # the second time they are packed already
        assert nybble.load_into(made, tmp_path / "q") == []
        assert torch.equal(made.m.experts.w, expected) and torch.equal(made.m.experts.bias, torch.ones(2))
    with pytest.raises(CheckpointError, match="is not quantized, but the module has it packed"):
        nybble.load_into(made, tmp_path / "w.safetensors")
    other = module(2, 33, 64)
    with pytest.raises(CheckpointError, match=r"has shape \[2, 33, 65\], the module wants \[2, 33, 64\]"):
        nybble.load_into(other, tmp_path / "q")
    assert not packed_parameters(other.m.experts)
    with pytest.raises(CheckpointError, match=r"the module has no parameter 'm\.experts\.w'"):
        nybble.load_into(torch.nn.Linear(2, 2), tmp_path / "q", strict=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["fp32", "bf16", "nf4", "fp4", "int8"])
def test_merging_beside_packed_experts(source: Path, tmp_path: Path, to: str) -> None:
    nybble.quantize(source, tmp_path / "q")
    model = nybble.load(tmp_path / "q")
    nybble.add_lora(model, nybble.LoRAConfig(r=2, alpha=4, target=("q_proj",)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05)
    nybble.save_adapter(model, tmp_path / "adapter")
    report = nybble.merge(tmp_path / "q", tmp_path / "adapter", tmp_path / "out", to)
    assert len(report.rows) == 2
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("q", "out"))
    experts = [name for name in before if name.endswith(("gate_up_proj", "down_proj"))]
    block = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config")
    if to in ("fp32", "bf16"):
        assert block is None
        assert all(after[name].ndim == 3 and after[name].is_floating_point() for name in experts)
        assert not any(".absmax" in name for name in after)
    else:
        assert block["quant_method"] == "nybble"
        assert all(f"{name}.absmax" in after for name in experts)
        if to != "fp4":
            kept = [name for name in before if ".experts." in name]
            assert all(torch.equal(after[name], before[name]) for name in kept)
    if to == "int8":
        assert report.notes == ["4 weights stay in their 4-bit format: int8 takes matrices, they have more axes"]
    ours = nybble.load(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(ours), logits(theirs))
    if to == "fp32":
        expected = logits(model)
        torch.testing.assert_close(logits(ours), expected, rtol=0, atol=3e-5 * expected.abs().max().item())
    with pytest.raises(CheckpointError, match="its weights are quantized"):
        nybble.unmerge(tmp_path / "q", tmp_path / "adapter", tmp_path / "x")
    only = {name: value for name, value in before.items() if ".experts." in name}
    (tmp_path / "only").mkdir()
    save_file(only, tmp_path / "only" / "model.safetensors")
    with pytest.raises(CheckpointError, match="its weights are quantized"):
        nybble.unmerge(tmp_path / "only", tmp_path / "adapter", tmp_path / "x")


FUSES = pytest.mark.skipif(
    importlib.util.find_spec("transformers.core_model_loading") is None,
    reason="transformers 4 has a module for each expert",
)
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "initializer_range": 0.1, "pad_token_id": 0,
}  # fmt: skip
PER_EXPERT = {
    "Mixtral": {"num_local_experts": 12, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
}


@FUSES
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PER_EXPERT)
def test_experts_that_transformers_fuses_while_loading(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **PER_EXPERT[kind])
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "src")
    assert any(".experts.0." in name for name in load_file(tmp_path / "src" / "model.safetensors"))
    nybble.quantize(tmp_path / "src", tmp_path / "q", QuantConfig(overrides={"*.experts.*": None}))
    ours = nybble.load(tmp_path / "q")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert torch.equal(logits(ours), logits(theirs))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "src")
    for name, value in reference.named_parameters():
        if "experts" in name and packed_count(ours) == 0:
            assert torch.equal(value, ours.get_parameter(name))
    ours.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(nybble.load(tmp_path / "saved")), logits(ours))
    path = tmp_path / "q" / "model.safetensors"
    values = load_file(path)
    lost = next(name for name in values if ".experts.3.down_proj" in name or ".experts.3.w2" in name)
    save_file({name: value for name, value in values.items() if not name.startswith(lost)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .*experts.* and .* more make .*down_proj"):
        nybble.load(tmp_path / "q")


@FUSES
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig("int8")], ids=["nf4", "int8"])
@pytest.mark.parametrize("kind", PER_EXPERT)
def test_experts_quantized_one_by_one(tmp_path: Path, kind: str, config: QuantConfig) -> None:
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(**SIZES, **PER_EXPERT[kind])
    getattr(transformers, f"{kind}ForCausalLM")(settings).save_pretrained(tmp_path / "src")
    report = nybble.quantize(tmp_path / "src", tmp_path / "q", config)
    assert sum(".experts." in row.name for row in report.tensors) == 2 * 3 * {"Mixtral": 12, "Qwen3Moe": 4}[kind]
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["quant_method"] == "nybble"
    ours = nybble.load(tmp_path / "q")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    for model in (ours, theirs):
        assert not any(p.is_floating_point() for name, p in model.named_parameters() if "experts" in name)
    files = load_file(tmp_path / "q" / "model.safetensors")
    source = load_file(tmp_path / "src" / "model.safetensors")
    for name in source:
        if ".experts." in name:
            parts = {key.removeprefix(name[:-6]): value for key, value in files.items() if key.startswith(name[:-6])}
            source[name] = QuantTensor.from_state(parts, dtype=torch.float32).dequantize()
    save_file(source, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "src")
    for path in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"):
        for leaf in ("gate_up_proj", "down_proj"):
            want = getattr(reference.get_submodule(path), leaf)
            assert torch.equal(getattr(ours.get_submodule(path), leaf), want)
            assert torch.equal(getattr(theirs.get_submodule(path), leaf), want)
    assert torch.equal(logits(ours), logits(theirs))
    assert count_parameters(ours) == count_parameters(reference)
    for number, model in enumerate((ours, theirs, copy.deepcopy(ours))):
        out = tmp_path / f"saved{number}"
        model.save_pretrained(out)
        after = load_file(out / "model.safetensors")
        assert after.keys() == files.keys()
        assert all(torch.equal(after[name], value) for name, value in files.items())
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    experts = theirs.model.layers[0].mlp.experts
    experts.parametrizations.down_proj[0].parts[1].packed.zero_()
    assert not torch.equal(experts.down_proj, ours.model.layers[0].mlp.experts.down_proj)
    theirs.load_state_dict(state)
    assert torch.equal(experts.down_proj, ours.model.layers[0].mlp.experts.down_proj)
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.1\."):
        theirs.load_state_dict({name: value for name, value in state.items() if ".experts.1." not in name})
    assert ours.to(torch.bfloat16).model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    lost = next(name for name in files if ".experts.1." in name and name.endswith(".weight"))
    kept = {name: value for name, value in files.items() if not name.startswith(lost.removesuffix("weight"))}
    save_file({**kept, lost: source[lost]}, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"is quantized and .*experts\.1.* is not, but .* is made of both"):
        nybble.load(tmp_path / "q")
