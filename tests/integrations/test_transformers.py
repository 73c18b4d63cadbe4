"""transformers' own from_pretrained, save_pretrained and Trainer with nybble's quantizer."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nybble
from nybble import QuantConfig, QuantLinear

transformers = pytest.importorskip("transformers")
IDS = torch.arange(24).reshape(2, 12)


def write(directory: Path, **settings: Any) -> Path:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64, "initializer_range": 0.1,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **settings}))
    model.save_pretrained(directory)
    return directory


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


CONFIGS = [QuantConfig(), QuantConfig("int8"), QuantConfig("int4"), QuantConfig(overrides={"down_proj": "int8"})]


@pytest.mark.parametrize("config", CONFIGS, ids=["nf4", "int8", "int4", "mixed"])
@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True, "attention_bias": True}], ids=["plain", "tied"])
def test_from_pretrained_and_save_pretrained(tmp_path: Path, config: QuantConfig, settings: dict[str, Any]) -> None:
    source = write(tmp_path / "src", **settings)
    nybble.quantize(source, tmp_path / "q", config, max_shard_size=60_000)
    ours = nybble.load(tmp_path / "q")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert sum(isinstance(module, QuantLinear) for module in theirs.modules()) == 14
    assert torch.equal(logits(theirs), logits(ours))
    for number, model in enumerate((theirs, ours)):
        model.save_pretrained(tmp_path / f"saved{number}")
        again = nybble.load(tmp_path / f"saved{number}")
        assert torch.equal(logits(again), logits(ours))
        third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"saved{number}")
        assert torch.equal(logits(third), logits(ours))
        block = json.loads((tmp_path / f"saved{number}" / "config.json").read_text())["quantization_config"]
        assert block == json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
        before = {n: t for p in sorted((tmp_path / "q").glob("*.safetensors")) for n, t in load_file(p).items()}
        after = load_file(tmp_path / f"saved{number}" / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_on_the_fly(tmp_path: Path) -> None:
    source = write(tmp_path / "src")
    config = QuantConfig("nf4", block_size=32, skip=("lm_head", "down_proj"))
    model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    nybble.quantize(source, tmp_path / "q", config)
    assert torch.equal(logits(model), logits(nybble.load(tmp_path / "q")))
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    block = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "bitsandbytes"
    assert QuantConfig.from_dict(block["nybble"]) == config


PROGRAM = """
    import sys, warnings
    warnings.simplefilter("ignore")
    {imports}
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu")
    print(type(model.model.layers[0].mlp.up_proj).__module__, "bitsandbytes" in sys.modules)
"""


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ("import nybble", "nybble.nn.linear"),
        ("import transformers.quantizers.auto, nybble", "nybble.nn.linear"),
        ("", "bitsandbytes.nn.modules"),
        ("import os; os.environ['NYBBLE_TRANSFORMERS'] = '0'; import nybble", "bitsandbytes.nn.modules"),
    ],
)
def test_who_loads_a_directory_of_ours(tmp_path: Path, imports: str, expected: str) -> None:
    if "bitsandbytes" in expected:
        pytest.importorskip("bitsandbytes")
    nybble.quantize(write(tmp_path / "src"), tmp_path / "q")
    program = textwrap.dedent(PROGRAM.format(imports=imports))
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "q"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == expected


def test_bitsandbytes_keeps_its_own_directories(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    nybble.quantize(write(tmp_path / "src"), tmp_path / "q")
    path = tmp_path / "q" / "config.json"
    settings = json.loads(path.read_text())
    del settings["quantization_config"]["nybble"]
    path.write_text(json.dumps(settings))
    program = textwrap.dedent(PROGRAM.format(imports="import nybble"))
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "q"], capture_output=True, text=True, check=False)
    assert done.stdout.split()[:1] == ["bitsandbytes.nn.modules"], done.stderr


def test_importing_nybble_imports_no_transformers() -> None:
    program = "import sys, nybble; print('transformers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.filterwarnings("ignore")
def test_trainer_trains_adapters(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    nybble.quantize(write(tmp_path / "src"), tmp_path / "q")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    nybble.add_lora(model, nybble.LoRAConfig(r=4, alpha=16))
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=2, learning_rate=2e-2,
        report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    nybble.save_adapter(model, tmp_path / "adapter")
    other = nybble.load(tmp_path / "q")
    nybble.load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(logits(other), logits(model.eval()))
