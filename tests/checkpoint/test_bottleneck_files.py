"""Bottleneck adapters in files, damaged ones too; merging is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, build, ids, output, randomize

import nybble
from nybble import add_bottleneck
from nybble.checkpoint.bottleneck import bottlenecks_of, load_bottleneck, save_bottleneck
from nybble.errors import CheckpointError, PatternError
from nybble.nn.adapters import Adapted


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = build(kind, "nf4")
    add_bottleneck(model, name="x", reduction=10, activation="gelu", scaling=2.0, layer_norm=True)
    randomize(model, "x")
    nybble.save_adapter(model, tmp_path / "a", name="x")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "BOTTLENECK" and settings["size"] == 6 and len(settings["target_modules"]) == 4
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    first = settings["target_modules"][0]
    assert f"base_model.model.{first}.bottleneck.down.weight" in keys and len(keys) == 24
    other = build(kind, "nf4")
    nybble.load_adapter(other, tmp_path / "a", name="y")
    assert torch.equal(output(other, ids()), output(model, ids()))
    before = output(model, ids())
    randomize(model, "x")
    load_bottleneck(model, tmp_path / "a", "x")  # into the one that is there
    assert torch.equal(output(model, ids()), before)


def test_sizes_of_their_own_are_kept(tmp_path: Path) -> None:
    model = build("llama")
    add_bottleneck(model, target=("gate_proj", "down_proj"), reduction=16)  # outputs of 128 and of 64
    randomize(model, "default")
    nybble.save_adapter(model, tmp_path / "a")
    other = build("llama")
    nybble.load_adapter(other, tmp_path / "a")
    assert torch.equal(output(other, ids()), output(model, ids()))


def damage(directory: Path, settings: dict[str, Any], tensors: dict[str, Any]) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    file = directory / "adapter_model.safetensors"
    values = {**load_file(file), **tensors}
    save_file({key: value for key, value in values.items() if value is not None}, file)


KEY = "base_model.model.model.layers.0.mlp.down_proj.bottleneck"


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"size": 0}, {}, "size = 0, a positive integer is needed"),
        ({"size": 5}, {}, r"down.weight' has shape \[4, 64\]; size 5 wants \[5, 64\]"),
        ({"activation": "elu"}, {}, "activation = 'elu', 'relu' or 'gelu' or"),
        ({"dropout": 2}, {}, r"dropout = 2, a number in \[0, 1\) is needed"),
        ({"scaling": "1"}, {}, "scaling = '1', a positive number is needed"),
        ({"layer_norm": True}, {}, "norm.weight' is missing"),
        ({"layer_norm": 1}, {}, "layer_norm = 1, true or false is needed"),
        ({"target_modules": "mlp"}, {}, "target_modules = 'mlp', a list of module names is needed"),
        ({"target_modules": ["model.layers.0.mlp.down_proj"]}, {}, "belongs to no module of target_modules"),
        ({}, {f"{KEY}.up.bias": None}, f"tensor '{KEY}.up.bias' is missing"),
        ({}, {f"{KEY}.up.bias": torch.zeros(3)}, r"up.bias' has shape \[3\]"),
        ({}, {f"{KEY}.up.bias": torch.zeros(64, dtype=torch.int32)}, "has dtype I32, not F32, F16 or BF16"),
        ({}, {f"{KEY}.norm.bias": torch.zeros(64)}, "has a norm.bias, but layer_norm is false"),
        ({}, {"other": torch.zeros(1)}, "tensor 'other' is not of an adapter"),
        ({}, {"base_model.model.lm_head.odd": torch.zeros(1)}, "is no adapter and cannot be loaded"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    model = build("llama")
    add_bottleneck(model, size=4)
    nybble.save_adapter(model, tmp_path / "a")
    damage(tmp_path / "a", settings, tensors)
    fresh = build("llama")
    with pytest.raises(CheckpointError, match=message):
        nybble.load_adapter(fresh, tmp_path / "a")
    assert not any(isinstance(module, Adapted) for module in fresh.modules())


def test_a_file_for_another_model(tmp_path: Path) -> None:
    model = build("llama")
    add_bottleneck(model, size=4)
    nybble.save_adapter(model, tmp_path / "a")
    with pytest.raises(PatternError, match=r"the model has no module 'model.layers.0.self_attn.o_proj'"):
        nybble.load_adapter(build("bert"), tmp_path / "a")
    with pytest.raises(CheckpointError, match="the bottleneck is for an output of 64, the model's has 32"):
        nybble.load_adapter(build("llama", hidden_size=32), tmp_path / "a")
    add_bottleneck(model, size=6, name="b")
    with pytest.raises(CheckpointError, match="of adapter 'b' has size = 6, the file 4"):
        nybble.load_adapter(model, tmp_path / "a", name="b")
    add_bottleneck(model, size=4, name="c", placement="pfeiffer")
    with pytest.raises(CheckpointError, match="bottlenecks of adapter 'c' are not the file's"):
        nybble.load_adapter(model, tmp_path / "a", name="c")
    bottlenecks_of(model, "default")["model.layers.0.mlp.down_proj"].scaling = 2.0
    with pytest.raises(ValueError, match="differ in scaling"):
        save_bottleneck(model, "default")


def test_merging_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    add_bottleneck(model, size=4)
    nybble.save_adapter(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match="a bottleneck is a network with a non-linear activation"):
        nybble.merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
