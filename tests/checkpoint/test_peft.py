"""Adapters in PEFT's layout, read and written against PEFT itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nybble
from nybble import LoRAConfig, LoRALinear, add_lora
from nybble.checkpoint import StorageFullError, writer
from nybble.checkpoint.peft import lora_layers
from nybble.errors import CheckpointError, CheckpointNotFoundError, PatternError

Make = Callable[..., Path]


def adapted(directory: Path, **settings: Any) -> Any:
    """A loaded model with random LoRA weights on it."""
    model = nybble.load(directory)
    add_lora(model, LoRAConfig(**{"r": 4, "alpha": 8, **settings}))
    randomize(model)
    return model.eval()


def randomize(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_A.normal_(0, 0.1)
            layer.lora_B.normal_(0, 0.1)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """fp32 models: the same up to the order of summation."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


@pytest.fixture
def base(make: Make) -> Path:
    return make(dtype=torch.float32)


@pytest.fixture
def quantized(base: Path, tmp_path: Path) -> Path:
    nybble.quantize(base, tmp_path / "quantized")
    return tmp_path / "quantized"


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"target": "q_proj"}, {"dtype": torch.bfloat16}], ids=str)
def test_round_trip(quantized: Path, tmp_path: Path, token_ids: torch.Tensor, settings: dict[str, Any]) -> None:
    model = adapted(quantized, **settings)
    nybble.save_adapter(model, tmp_path / "adapter")
    fresh = nybble.load(quantized)
    nybble.load_adapter(fresh, tmp_path / "adapter")
    assert lora_layers(fresh).keys() == lora_layers(model).keys()
    for name, layer in lora_layers(model).items():
        other = fresh.get_submodule(name)
        assert torch.equal(layer.lora_A.float(), other.lora_A.float())
        assert torch.equal(layer.lora_B.float(), other.lora_B.float())
        assert layer.scaling == other.scaling
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    if "dtype" not in settings:
        assert torch.equal(logits(model, token_ids), logits(fresh.eval(), token_ids))
    randomize(fresh)
    for layer in lora_layers(fresh).values():
        layer.lora_A.data.zero_()
    nybble.load_adapter(fresh, tmp_path / "adapter")  # onto the same layers again
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_A.float(), fresh.get_submodule(name).lora_A.float())


def test_files(quantized: Path, tmp_path: Path) -> None:
    nybble.save_adapter(adapted(quantized), tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(quantized)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 28
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (4, 128)
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (64, 4)


def test_targets_are_whole_paths_where_last_parts_would_mean_more(quantized: Path, tmp_path: Path) -> None:
    model = adapted(quantized, target=("model.layers.0.self_attn.q_proj", "k_proj"))
    nybble.save_adapter(model, tmp_path / "adapter", base="some/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "model.layers.0.self_attn.q_proj"]
    assert config["base_model_name_or_path"] == "some/base"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("target", ["all-linear", ("model.layers.0.self_attn.q_proj", "up_proj")], ids=str)
def test_peft_reads_ours(base: Path, tmp_path: Path, token_ids: torch.Tensor, rslora: bool, target: Any) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = adapted(base, rslora=rslora, target=target)
    nybble.save_adapter(model, tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    names = {
        n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    }
    assert names == lora_layers(model).keys()
    assert_close(logits(model, token_ids), logits(theirs, token_ids))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"target_modules": r".*\.1\.mlp\.(up|gate)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["lm_head", "v_proj"], "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_we_read_pefts(base: Path, tmp_path: Path, token_ids: torch.Tensor, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = nybble.load(base)
    nybble.load_adapter(model, tmp_path / "adapter")
    assert_close(logits(model.eval(), token_ids), logits(theirs, token_ids))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{path}.adapters.default.lora_{part}" for path in lora_layers(model) for part in "AB"}
    nybble.save_adapter(model, tmp_path / "again")
    again, first = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("again", "adapter"))
    assert again.keys() == {name for name in first if "lora_" in name}
    assert all(torch.equal(again[name], first[name]) for name in again)


@pytest.fixture
def adapter(quantized: Path, tmp_path: Path) -> Path:
    nybble.save_adapter(adapted(quantized), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"peft_type": "LOHA"}, CheckpointError, "peft_type is 'LOHA'; 'LORA', .* can be loaded"),
        ({"r": 0}, CheckpointError, "r = 0, a positive integer"),
        ({"r": "4"}, CheckpointError, "r = '4', a positive integer"),
        ({"r": 8}, CheckpointError, r"lora_A.weight' has shape \[4, \d+\]; rank 8 wants \[8, inputs\]"),
        ({"use_dora": True}, CheckpointError, "use_dora is set, but there is no lora_magnitude_vector"),
        ({"bias": "all"}, CheckpointError, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, CheckpointError, "no tensor of 'lm_head', named in modules_to_save"),
        ({"target_modules": ["q_proj", "qkv"]}, PatternError, "target_modules: 'qkv' is no linear layer"),
    ],
)
def test_bad_settings(quantized: Path, adapter: Path, changes: dict[str, Any], error: Any, message: str) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    model = nybble.load(quantized)
    with pytest.raises(error, match=message):
        nybble.load_adapter(model, adapter)
    assert lora_layers(model) == {}, "a refused adapter leaves the model as it was"


def test_unknown_settings_are_ignored_with_a_warning(quantized: Path, adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "future_option": 3}))
    with pytest.warns(UserWarning, match=r"adapter_config\.json: unknown keys are ignored: future_option"):
        nybble.load_adapter(nybble.load(quantized), adapter)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(next(iter(t))), CheckpointError, "both lora_A and lora_B are needed"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(2)}),
            CheckpointError,
            "'lm_head.weight' is not of an adapter",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(128, 64)}),
            CheckpointError,
            "lm_head.weight' is not the model's",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.weight": torch.ones(128, 64)}),
            CheckpointError,
            "is no adapter and cannot be loaded",
        ),
        (
            lambda t: t.update({f"base_model.model.model.x.lora_{c}.weight": torch.ones(4, 4) for c in "AB"}),
            PatternError,
            r"the model has no linear layer 'model\.x'",
        ),
        (
            lambda t: t.update({k: v.int() for k, v in t.items() if "lora_B" in k}),
            CheckpointError,
            "has dtype I32, not F32, F16 or BF16",
        ),
        (lambda t: t.clear(), CheckpointError, "holds no LoRA tensor"),
    ],
)
def test_bad_tensors(quantized: Path, adapter: Path, change: Any, error: Any, message: str) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    model = nybble.load(quantized)
    with pytest.raises(error, match=message):
        nybble.load_adapter(model, adapter)
    assert lora_layers(model) == {}


def test_missing_files(quantized: Path, tmp_path: Path, adapter: Path) -> None:
    model = nybble.load(quantized)
    with pytest.raises(CheckpointNotFoundError, match=r"adapter_config\.json: no such file"):
        nybble.load_adapter(model, tmp_path / "absent")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointNotFoundError, match=r"adapter_model\.bin is not read"):
        nybble.load_adapter(model, adapter)


def test_an_adapter_that_is_not_the_models(quantized: Path, adapter: Path) -> None:
    with pytest.raises(CheckpointError, match="the model's LoRA layers of adapter 'default' are not the file's"):
        nybble.load_adapter(adapted(quantized, target="q_proj"), adapter)
    with pytest.raises(CheckpointError, match="r=4, alpha=16"):
        nybble.load_adapter(adapted(quantized, alpha=16), adapter)


def test_what_cannot_be_saved(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter to save"):
        nybble.save_adapter(nybble.load(quantized), tmp_path / "a")
    model = adapted(quantized)
    layer = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = LoRALinear.from_base(layer.base, r=4, alpha=8, rslora=True)
    with pytest.raises(ValueError, match="some LoRA layers use rsLoRA"):
        nybble.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_full_disk_leaves_the_adapter_that_was_there(
    quantized: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}

    def full(file: Any, data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_all", full)
    with pytest.raises(StorageFullError, match=r"adapter_model\.safetensors"):
        nybble.save_adapter(adapted(quantized, alpha=99), adapter)
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
