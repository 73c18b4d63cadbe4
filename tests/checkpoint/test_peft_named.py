"""Several adapters on one model and in files of their own, against PEFT's set_adapter and adapter_names."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.test_peft_kinds import assert_close, dequantized, logits
from safetensors.torch import load_file
from torch import nn

import nybble
from nybble import LoRAConfig, add_lora
from nybble.errors import CheckpointError, PatternError
from nybble.nn import LoRAEmbedding, LoRALinear, TrainedCopy
from nybble.nn.adapters import adapter_parameters

peft = pytest.importorskip("peft")
Make = Callable[..., Path]
IDS = torch.arange(60).reshape(3, 20)

CONFIGS: dict[str, dict[str, Any]] = {
    "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "two": {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": ["v_proj", "o_proj", "lm_head"]},
}


def randomize(parameters: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.fixture
def base(make: Make) -> Path:
    return make(dtype=torch.float32)


@pytest.fixture(params=["fp32", "nf4"])
def ours_and_theirs(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> tuple[Any, Any]:
    """The same model, for us and for PEFT."""
    if request.param == "fp32":
        return nybble.load(base), nybble.load(base)
    nybble.quantize(base, tmp_path / "nf4")
    return nybble.load(tmp_path / "nf4"), dequantized(tmp_path / "nf4")


def peft_adapters(plain: Any, directory: Path, configs: dict[str, dict[str, Any]]) -> Any:
    """A PEFT model with these adapters, trained; each saved in a directory of its own."""
    model = None
    for name, settings in configs.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        if model is None:
            model = peft.get_peft_model(plain, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    for seed, name in enumerate(configs):
        own = [p for key, p in model.named_parameters() if f".{name}." in key]
        randomize(own, seed)
        model.save_pretrained(directory, selected_adapters=[name])
    return model.eval()


@pytest.mark.filterwarnings("ignore")
def test_swapping_and_mixing_give_what_peft_gives(ours_and_theirs: tuple[Any, Any], tmp_path: Path) -> None:
    ours, plain = ours_and_theirs
    before = logits(ours, IDS)
    theirs = peft_adapters(plain, tmp_path, CONFIGS)
    for name in CONFIGS:
        nybble.load_adapter(ours, tmp_path / name, name=name)
    assert [(info.name, info.acting) for info in nybble.adapters(ours)] == [("one", False), ("two", True)]
    swapped = {}
    for name in ("one", "two", "one"):
        theirs.set_adapter(name)
        nybble.set_adapter(ours, name)
        swapped[name] = logits(theirs, IDS)
        assert_close(logits(ours, IDS), swapped[name])
    assert not torch.allclose(swapped["one"], swapped["two"], atol=1e-3)
    nybble.set_adapter(ours, None)
    assert torch.equal(logits(ours, IDS), before)
    rows = ["two", "__base__", "one"]
    nybble.set_adapter(ours, [None if name == "__base__" else name for name in rows])
    assert_close(logits(ours, IDS), logits(theirs, IDS, adapter_names=rows))


@pytest.mark.filterwarnings("ignore")
def test_mixed_rows_generate_what_each_adapter_generates(ours_and_theirs: tuple[Any, Any], tmp_path: Path) -> None:
    ours, plain = ours_and_theirs
    peft_adapters(plain, tmp_path, CONFIGS)
    for name in CONFIGS:
        nybble.load_adapter(ours, tmp_path / name, name=name)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    rows = ("two", None, "one")
    wanted = []
    for row, name in zip(IDS, rows, strict=True):
        with nybble.use_adapter(ours, name):
            wanted.append(ours.generate(row[None], **settings)[0])
    nybble.set_adapter(ours, rows)
    assert torch.equal(ours.generate(IDS, **settings), torch.stack(wanted))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_with_heads_of_their_own_are_swapped(make: Make, tmp_path: Path, tied: bool) -> None:
    configs = {
        "one": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "two": {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    }
    directory = make(dtype=torch.float32, tied=tied)
    theirs = peft_adapters(nybble.load(directory), tmp_path / "theirs", configs)
    ours = nybble.load(directory)
    table = ours.model.embed_tokens.weight
    for name in configs:
        nybble.load_adapter(ours, tmp_path / "theirs" / name, name=name)
    assert isinstance(ours.lm_head, TrainedCopy) and list(ours.lm_head.adapters) == ["one", "two"]
    assert ours.model.embed_tokens.weight is table
    outputs = {}
    for name in ("one", "two"):
        theirs.set_adapter(name)
        nybble.set_adapter(ours, name)
        outputs[name] = logits(ours, IDS)
        assert_close(outputs[name], logits(theirs, IDS))
        nybble.save_adapter(ours, tmp_path / "ours" / name)
        again = peft.PeftModel.from_pretrained(nybble.load(directory), tmp_path / "ours" / name).eval()
        assert_close(logits(again, IDS), outputs[name])
    nybble.set_adapter(ours, ["two", "one", "two"])
    mixed = logits(ours, IDS)
    for row, name in enumerate(("two", "one", "two")):
        assert_close(mixed[row], outputs[name][row])


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_head_gets_a_full_copy_from_a_file(base: Path, tmp_path: Path) -> None:
    config = {"one": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}}
    theirs = peft_adapters(nybble.load(base), tmp_path, config)
    ours = nybble.load(base)
    quantized = nn.ModuleDict({"lm_head": ours.lm_head})
    nybble.quantize_(quantized, nybble.QuantConfig(skip=()))
    ours.lm_head = quantized["lm_head"]
    before = logits(ours, IDS)
    nybble.load_adapter(ours, tmp_path / "one")
    assert isinstance(ours.lm_head.base, nybble.QuantLinear)
    assert_close(logits(ours, IDS), logits(theirs, IDS))
    nybble.set_adapter(ours, None)
    assert torch.equal(logits(ours, IDS), before)


def two(base: Path) -> Any:
    """A model with two trained adapters, of which "large" acts."""
    model = nybble.load(base)
    add_lora(model, LoRAConfig(r=2, alpha=4, target=("q_proj", "embed_tokens")), name="small")
    add_lora(model, LoRAConfig(r=3, alpha=4, dora=True, modules_to_save=("norm",)), name="large")
    for seed, name in enumerate(("small", "large")):
        randomize(adapter_parameters(model, name).values(), seed)
    return model.eval()


def test_each_adapter_goes_to_a_file_of_its_own_and_comes_back_under_any_name(base: Path, tmp_path: Path) -> None:
    model = two(base)
    nybble.save_adapter(model, tmp_path / "acting")
    for name in ("small", "large"):
        nybble.save_adapter(model, tmp_path / name, name=name)
    one, other = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("acting", "large"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert (config["r"], config["use_dora"], config["modules_to_save"]) == (2, False, None)
    assert config["target_modules"] == ["embed_tokens", "q_proj"]
    fresh = nybble.load(base).eval()
    nybble.load_adapter(fresh, tmp_path / "small", name="a")
    nybble.load_adapter(fresh, tmp_path / "large", name="b")
    for name, known in (("small", "a"), ("large", "b")):
        nybble.set_adapter(model, name)
        nybble.set_adapter(fresh, known)
        assert torch.equal(logits(model, IDS), logits(fresh, IDS))


def test_saving_wants_a_name_where_several_could_be_meant(base: Path, tmp_path: Path) -> None:
    model = two(base)
    for which in (None, ["small", "large"]):
        nybble.set_adapter(model, which)
        with pytest.raises(ValueError, match="name: the model has the adapters 'small', 'large', and none acts on all"):
            nybble.save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="no adapter 'default'; it has 'small', 'large'"):
        nybble.save_adapter(model, tmp_path / "a", name="default")
    nybble.delete_adapter(model, "large")
    nybble.save_adapter(model, tmp_path / "a")  # the only one
    assert not (tmp_path / "a" / "model.safetensors").exists()


def test_loading_under_a_name_that_is_there_takes_the_values(base: Path, tmp_path: Path) -> None:
    model = two(base)
    expected = logits(model, IDS)
    nybble.save_adapter(model, tmp_path / "large", name="large")
    nybble.set_adapter(model, "small")
    small = logits(model, IDS)
    modules = [id(module) for module in model.modules()]
    randomize(adapter_parameters(model, "large").values(), 9)
    nybble.load_adapter(model, tmp_path / "large", name="large")
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(logits(model, IDS), expected)  # it acts now
    with pytest.raises(CheckpointError, match="LoRA layers of adapter 'small' are not the file's"):
        nybble.load_adapter(model, tmp_path / "large", name="small")
    with pytest.raises(ValueError, match=r"adapter name is 'a\.b'"):
        nybble.load_adapter(model, tmp_path / "large", name="a.b")
    nybble.set_adapter(model, "small")
    assert torch.equal(logits(model, IDS), small)


def test_a_refused_file_leaves_all_adapters_as_they_were(base: Path, tmp_path: Path) -> None:
    model = two(base)
    nybble.save_adapter(model, tmp_path / "large", name="large")
    path = tmp_path / "large" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["nothing"]}))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(PatternError, match="target_modules: 'nothing' is no"):
        nybble.load_adapter(model, tmp_path / "large", name="third")
    assert model.state_dict().keys() == state.keys()
    assert [(info.name, info.acting) for info in nybble.adapters(model)] == [("small", False), ("large", True)]


def test_one_name_for_two_kinds_is_no_file(base: Path, tmp_path: Path) -> None:
    model = nybble.load(base)
    nybble.add_bottleneck(model, size=3, name="both")
    nybble.save_adapter(model, tmp_path / "bottleneck")
    add_lora(model, LoRAConfig(r=2), name="both")
    with pytest.raises(ValueError, match="adapter 'both' is bottleneck and lora in one, and a file holds one kind"):
        nybble.save_adapter(model, tmp_path / "a", name="both")
    assert not (tmp_path / "a").exists()
    other = nybble.load(base)
    add_lora(other, LoRAConfig(r=2), name="both")
    with pytest.raises(CheckpointError, match="the model's adapter 'both' is lora, the file's bottleneck"):
        nybble.load_adapter(other, tmp_path / "bottleneck", name="both")


def test_lora_beside_bottlenecks_keeps_the_names_of_its_layers(base: Path, tmp_path: Path) -> None:
    model = nybble.load(base)
    nybble.add_bottleneck(model, size=3, name="bottleneck")
    add_lora(model, LoRAConfig(r=2), name="lora")
    randomize(adapter_parameters(model, "lora").values(), 1)
    expected = logits(model.eval(), IDS)
    nybble.save_adapter(model, tmp_path / "lora")
    fresh = nybble.load(base)
    nybble.load_adapter(fresh, tmp_path / "lora")
    assert torch.equal(logits(fresh.eval(), IDS), expected)
    assert not any(
        "base" in key.replace("base_model", "") for key in load_file(tmp_path / "lora/adapter_model.safetensors")
    )


def test_what_a_user_unfroze_is_saved_with_the_adapter(base: Path, tmp_path: Path) -> None:
    model = nybble.load(base)
    add_lora(model, LoRAConfig(r=2))
    model.model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    nybble.save_adapter(model, tmp_path / "a")
    fresh = nybble.load(base)
    nybble.load_adapter(fresh, tmp_path / "a")
    assert isinstance(fresh.model.norm, TrainedCopy)
    assert torch.equal(logits(fresh.eval(), IDS), logits(model.eval(), IDS))


def test_load_into_passes_adapters_over(base: Path, tmp_path: Path) -> None:
    model = two(base)
    expected = logits(model, IDS)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (LoRALinear, LoRAEmbedding, TrainedCopy)):
                module.base.weight.zero_()
    nybble.load_into(model, base)
    assert torch.equal(logits(model, IDS), expected)
    nybble.quantize(base, tmp_path / "nf4")
    nybble.load_into(model, tmp_path / "nf4")
    assert isinstance(model.model.layers[0].self_attn.q_proj.base, nybble.QuantLinear)
    other = nybble.load(tmp_path / "nf4")
    nybble.save_adapter(model, tmp_path / "a")
    nybble.load_adapter(other, tmp_path / "a")
    assert torch.equal(logits(model, IDS), logits(other.eval(), IDS))
