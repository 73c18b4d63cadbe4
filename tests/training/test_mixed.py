"""Several adapters in one run: each as in a run of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXT, ByteTokenizer, llama

from nybble import LoRAConfig, QuantConfig, TrainConfig, add_lora, finetune, load_adapter, quantize_
from nybble.nn.adapters import adapter_parameters, set_adapter
from nybble.training.tasks import MixedTask

CONFIG = TrainConfig(
    steps=4,
    batch_size=2,
    grad_accum=2,
    seq_len=32,
    lr=1e-2,
    warmup_steps=1,
    dtype="fp32",
    max_grad_norm=0.5,
    plot=False,
)
DATA = {
    "a": torch.tensor(list(TEXT.encode())),
    "b": torch.tensor(list(TEXT.encode())).flip(0),
    "c": [sentence for sentence in TEXT.split(". ") * 2],
}


def model(quantized: bool = True, dropout: float = 0.0) -> Any:
    made = llama()
    if quantized:
        quantize_(made, QuantConfig())
    for i, name in enumerate(DATA):
        torch.manual_seed(i)
        target = ("q_proj", "v_proj") if name == "b" else "all-linear"
        add_lora(made, LoRAConfig(r=2 << i, alpha=8, target=target, dora=name == "c", dropout=dropout), name)
    return made


def run(made: Any, data: Any, config: TrainConfig = CONFIG, **options: Any) -> Any:
    return finetune(made, data, config, tokenizer=ByteTokenizer(), show=False, **options)


@pytest.mark.parametrize("quantized", [True, False], ids=["nf4", "plain"])
@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_three_adapters_in_one_run_equal_three_runs(quantized: bool, packing: str, checkpointing: bool) -> None:
    config = dataclasses.replace(CONFIG, packing=packing, gradient_checkpointing=checkpointing)
    together = model(quantized)
    report = run(together, DATA, config)
    assert list(report.adapter_losses) == list(DATA)
    for name, part in DATA.items():
        alone = model(quantized)
        set_adapter(alone, name)
        own = run(alone, part, config)
        # fp32 sums in another order; the gradients are clipped for each adapter by itself.
        assert report.adapter_losses[name] == pytest.approx(own.losses, rel=1e-4)
        for (path, a), b in zip(
            adapter_parameters(together, name).items(), adapter_parameters(alone, name).values(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4, msg=path)
    means = [sum(losses) / 3 for losses in zip(*report.adapter_losses.values(), strict=True)]
    assert report.losses == pytest.approx(means)


def test_each_is_saved_by_its_name_and_loads_alone(tmp_path: Path) -> None:
    together = model()
    report = run(together, DATA, dataclasses.replace(CONFIG, out_dir=tmp_path / "out"))
    assert sorted(p.name for p in report.adapter_dir.iterdir()) == ["a", "b", "c"]
    ids = torch.arange(20)[None]
    for name in DATA:
        fresh = llama()
        quantize_(fresh, QuantConfig())
        load_adapter(fresh, report.adapter_dir / name)
        set_adapter(together, name)
        with torch.no_grad():
            assert torch.equal(fresh(ids).logits, together(ids).logits)


def test_held_out_data_is_each_adapters_own() -> None:
    together = model()
    report = run(together, DATA, dataclasses.replace(CONFIG, val_fraction=0.2))
    losses = []
    for name, part in DATA.items():
        alone = model()
        set_adapter(alone, name)
        losses.append(run(alone, part, dataclasses.replace(CONFIG, val_fraction=0.2)).evaluations[0].loss)
    assert report.evaluations[0].loss == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="no adapter 'd'"):
        run(model(), {"a": DATA["a"], "d": DATA["a"]})
    with pytest.raises(ValueError, match="empty mapping"):
        run(model(), {})
    with pytest.raises(ValueError, match="adapter 'b' is not trained"):
        run(model(), {"a": DATA["a"]}, eval_data={"b": DATA["b"]})
    assert MixedTask.__doc__
