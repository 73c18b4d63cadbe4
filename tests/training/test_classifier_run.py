"""A run of a classifier leaves head and adapter in one directory that loads back; mapped weights are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXT, ByteTokenizer, llama, write_model

import nybble
from nybble import LoRAConfig, TrainConfig, finetune, load_adapter
from nybble.nn import (
    BottleneckConfig,
    PrefixConfig,
    PromptConfig,
    add_bottleneck,
    add_lora,
    add_prefix,
    add_prompt,
    train_all,
    train_only,
)
from nybble.training import TextClassifier

transformers = pytest.importorskip("transformers")
TEXTS = [{"text": f"{'good' if i % 2 else 'bad'} thing {i}", "label": i % 2} for i in range(30)]
CONFIG = TrainConfig(steps=4, batch_size=4, seq_len=32, lr=1e-2, warmup_steps=0, dtype="fp32", save_every=1, plot=False)
METHODS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda model: add_lora(model.encoder, LoRAConfig(r=4)),
    "lora, head too": lambda model: add_lora(model, LoRAConfig(r=4)),
    "bottleneck": lambda model: add_bottleneck(model.encoder, BottleneckConfig(size=4)),
    "prefix": lambda model: add_prefix(model.encoder, PrefixConfig(tokens=4)),
    "prompt": lambda model: add_prompt(model.encoder, PromptConfig(tokens=4)),
    "probe": lambda model: train_only(model, "head"),
}


def classifier() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=256,
        max_position_embeddings=64,
    )
    return TextClassifier(transformers.BertModel(config).eval(), 2)


def run(model: Any, out: Path | None, **options: Any) -> Any:
    config = dataclasses.replace(CONFIG, out_dir=out)
    return finetune(model, TEXTS, config, tokenizer=ByteTokenizer(), show=False, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20))


@pytest.mark.parametrize("method", METHODS)
def test_head_and_adapter_come_back(method: str, tmp_path: Path) -> None:
    trained, fresh = classifier(), classifier()
    METHODS[method](trained)
    report = run(trained, tmp_path / "out")
    assert not torch.equal(logits(trained), logits(fresh))
    load_adapter(fresh, report.adapter_dir)
    assert torch.equal(logits(fresh), logits(trained))
    # And again, as an adapter whose copy of the head is trained on.
    report = run(fresh, tmp_path / "more")
    again = classifier()
    load_adapter(again, report.adapter_dir)
    assert torch.equal(logits(again), logits(fresh)) and not torch.equal(logits(again), logits(trained))


@pytest.mark.parametrize("method", ["lora", "probe"])
def test_a_classifiers_run_goes_on_to_the_same_bits(method: str, tmp_path: Path) -> None:
    whole = classifier()
    METHODS[method](whole)
    expected = run(whole, None).losses

    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise ZeroDivisionError

    first, second = classifier(), classifier()
    METHODS[method](first)
    METHODS[method](second)
    with pytest.raises(ZeroDivisionError):
        run(first, tmp_path / "out", on_step=stop)
    report = run(second, tmp_path / "out")
    assert report.resumed_from == 2 and report.losses == expected and torch.equal(logits(second), logits(whole))


def test_a_weight_that_is_trained_beside_its_update_is_refused(tmp_path: Path) -> None:
    model = classifier()
    add_lora(model, LoRAConfig(r=4))
    model.head.requires_grad_(True)
    with pytest.raises(ValueError, match="head has an update by adapter 'default', and its own weight is trained too"):
        run(model, tmp_path / "out")


def test_peft_loads_a_probe(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trained = classifier()
    train_only(trained, "head")
    report = run(trained, tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(classifier(), str(report.adapter_dir)).eval()
    assert torch.equal(logits(loaded), logits(trained))


def test_a_model_that_is_trained_whole_says_how_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter to save .* by the argument save"):
        run(classifier(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_weights_mapped_from_a_read_only_file_are_trained_and_the_file_is_not(
    dtype: torch.dtype, optimizer: str, tmp_path: Path
) -> None:
    file = write_model(tmp_path / "model", dtype) / "model.safetensors"
    file.chmod(0o444)
    before = file.read_bytes()
    model = nybble.load(file.parent)
    assert train_all(model) == sum(p.numel() for p in llama().parameters())
    tokens = torch.tensor(list(TEXT.encode()))
    config = dataclasses.replace(CONFIG, steps=10, optimizer=optimizer, ema_decay=0.5)
    losses = finetune(model, tokens, config, show=False).losses
    assert losses[-1] < losses[0] - 1 and file.read_bytes() == before
