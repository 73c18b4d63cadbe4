"""The loop: it learns, accumulation equals the bigger batch, it stops clearly, and leaves whole files behind."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import CONTEXT, TEXT, ByteTokenizer, llama
from torch import nn

import nybble
from nybble import LoRAConfig, QuantConfig, TrainConfig, add_lora, finetune, load_adapter, quantize_
from nybble.training import NonFiniteLossError, learning_rate, perplexity
from nybble.training.metrics import Display, MetricsFile, memory_bytes, peak_memory_bytes
from nybble.training.optimization import make_optimizer

TOKENS = torch.tensor(list(TEXT.encode()))
SHORT = TrainConfig(steps=3, batch_size=2, seq_len=32, lr=1e-3, warmup_steps=0, dtype="fp32")


def adapted(quantized: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    model = llama(dtype)
    if quantized:
        quantize_(model, QuantConfig())
    add_lora(model, LoRAConfig(r=4, alpha=8, dropout=dropout))
    return model


def run(model: nn.Module, data: Any = TOKENS, config: TrainConfig = SHORT, **options: Any) -> Any:
    changes = {k: options.pop(k) for k in list(options) if k in {f.name for f in dataclasses.fields(TrainConfig)}}
    return finetune(model, data, dataclasses.replace(config, **changes), show=False, **options)


def adapter_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loss_falls_and_the_base_stays_as_it_was(quantized: bool, dtype: str) -> None:
    model = adapted(quantized)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "lora" not in k}
    before = perplexity(model, TOKENS, 64)
    report = run(model, steps=30, batch_size=4, lr=1e-2, dtype=dtype)
    after = perplexity(model, TOKENS, 64)
    assert after < 0.5 * before, (before, after)
    assert sum(report.losses[-5:]) < sum(report.losses[:5])
    assert len(report.losses) == 30 and report.tokens == 30 * 4 * 32
    assert report.tokens_per_second > 0 and not report.interrupted
    for name, value in frozen.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_accumulated_micro_batches_equal_the_bigger_batch() -> None:
    reports, adapters = [], []
    for batch_size, grad_accum in ((4, 1), (2, 2), (1, 4)):
        model = adapted(quantized=True)
        # SGD-like sensitivity is what AdamW hides, so the gradient norm is compared too, through clipping to 0.1.
        reports.append(run(model, batch_size=batch_size, grad_accum=grad_accum, max_grad_norm=0.1, eps=1e-3))
        adapters.append(adapter_of(model))
    for report, adapter in zip(reports[1:], adapters[1:], strict=True):
        # fp32 sums in another order.
        assert report.losses == pytest.approx(reports[0].losses, rel=1e-5)
        for name, value in adapter.items():
            torch.testing.assert_close(value, adapters[0][name], rtol=1e-3, atol=1e-6)


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_run() -> None:
    runs = []
    for seed in (0, 0, 1):
        model = adapted(quantized=True, dropout=0.1)
        runs.append((run(model, seed=seed).losses, adapter_of(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    assert runs[0][0] != runs[2][0]


def test_gradient_checkpointing_changes_memory_not_the_result() -> None:
    plain, checkpointed = adapted(), adapted()
    expected = run(plain)
    found = run(checkpointed, gradient_checkpointing=True)
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.modules())


def test_a_plain_module_without_transformers_trains() -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(256, 256)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.table(input_ids)

    losses = run(Bigram(), steps=20, lr=0.3).losses
    assert losses[-1] < losses[0] - 1


def test_weight_decay_spares_vectors() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[0].weight.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = make_optimizer(trained, TrainConfig(weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.0, 3)]


def test_lora_plus_gives_b_a_rate_of_its_own() -> None:
    trained = {name: p for name, p in adapted().named_parameters() if p.requires_grad}
    groups = make_optimizer(trained, TrainConfig(lora_plus_ratio=16.0)).param_groups
    assert {group["lr_scale"]: len(group["params"]) for group in groups} == {1.0: 14, 16.0: 14}


def test_schedule_rises_linearly_and_falls_by_half_a_cosine() -> None:
    config = TrainConfig(lr=2.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(step, 14, config) for step in range(14)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(0.2 + 1.8 * 0.5)  # half way down
    assert rates[-1] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:]))
    assert learning_rate(0, 1, TrainConfig(lr=2.0, warmup_steps=0)) == pytest.approx(0.2)
    assert [learning_rate(s, 2, TrainConfig(lr=2.0, warmup_steps=9)) for s in range(2)] == [1.0, 2.0]


def test_epochs_become_steps() -> None:
    config = TrainConfig(epochs=1.5, batch_size=2, grad_accum=2)
    assert config.total_steps(10) == 4  # ceil(15 / 4)
    assert TrainConfig().total_steps(10) == 3
    assert TrainConfig(epochs=0.001).total_steps(10) == 1


def test_files_left_behind_are_whole_and_the_adapter_returns(tmp_path: Path) -> None:
    model = adapted(quantized=True)
    out = tmp_path / "out"
    report = run(model, TEXT.split("."), tokenizer=ByteTokenizer(), eval_data=[TEXT], eval_every=2, out_dir=out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert report.metrics_path == out / "metrics.jsonl"
    assert lines[0]["kind"] == "config" and lines[0]["seq_len"] == 32 and lines[0]["total_steps"] == 3
    assert [line["loss"] for line in lines if line["kind"] == "step"] == report.losses
    assert [(line["step"], line["loss"]) for line in lines if line["kind"] == "eval"] == [
        (evaluation.step, evaluation.loss) for evaluation in report.evaluations
    ]
    assert [evaluation.step for evaluation in report.evaluations] == [0, 2, 3]
    assert report.plot_path is not None and report.plot_path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert report.plot_path.stat().st_size > 5000
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "loss.png", "metrics.jsonl"]

    fresh = llama()
    quantize_(fresh, QuantConfig())
    assert report.adapter_dir is not None
    load_adapter(fresh, report.adapter_dir)
    ids = TOKENS[None, :40]
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_evaluation_is_the_perplexity_of_the_held_out_rows() -> None:
    model = adapted()
    report = run(model, val_fraction=0.2, eval_windows=3)
    rows = (TOKENS.numel() - 1) // 32
    first = (rows - round(0.2 * rows)) * 32
    losses = []
    for i in range(3):
        part = TOKENS[first + 32 * i : first + 32 * i + 33]
        losses.append(torch.log(torch.tensor(perplexity(model, part, 33))))
    assert report.evaluations[-1].loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_an_interrupt_ends_after_the_step_and_saves_what_there_is(tmp_path: Path) -> None:
    def interrupt(step: int, loss: float) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    output = io.StringIO()
    config = dataclasses.replace(SHORT, steps=50, out_dir=tmp_path / "out")
    model = adapted()
    report = finetune(model, TOKENS, config, on_step=interrupt, console=Console(file=output, width=200))
    assert report.interrupted and len(report.losses) == 2
    assert f"stopped after step 2 of 50; saved in {tmp_path / 'out' / 'adapter'}" in output.getvalue()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert report.plot_path is not None and report.plot_path.is_file()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_interrupt_is_not_held_back() -> None:
    def interrupt(step: int, loss: float) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(adapted(), on_step=interrupt)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    model = adapted()

    def poison(step: int, loss: float) -> None:
        if step == 2:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    with pytest.raises(NonFiniteLossError, match=r"step 3: the loss is nan.*lr") as caught:
        run(model, on_step=poison, out_dir=tmp_path / "out")
    assert caught.value.step == 3
    assert not model.training
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.jsonl", "run.json"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": 1, "epochs": 1}, "give steps or epochs, not both"),
        ({"epochs": 0}, "epochs must be a number above 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"batch_size": 1.5}, r"batch_size must be an integer of at least 1, got 1\.5"),
        ({"grad_accum": True}, "grad_accum must be an integer"),
        ({"seq_len": -1}, "seq_len must be an integer"),
        ({"lr": 0.0}, "lr must be a number above 0"),
        ({"lr": float("nan")}, "lr must be a number above 0, got nan"),
        ({"min_lr_ratio": 2}, "min_lr_ratio must be a number from 0 to 1"),
        ({"val_fraction": 1.0}, "val_fraction must be a number at least 0 and below 1"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"dtype": "fp8"}, "dtype must be 'bf16' or 'fp32', got 'fp8'"),
        ({"eval_windows": 0}, "eval_windows must be an integer of at least 1"),
    ],
)
def test_a_bad_option_is_named_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_what_does_not_fit_the_model_is_refused_before_training(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=rf"seq_len={CONTEXT + 1} .*max_position_embeddings={CONTEXT}"):
        run(model, seq_len=CONTEXT + 1)
    with pytest.raises(ValueError, match="data is empty"):
        run(model, [])
    with pytest.raises(ValueError, match=r"data has 10 tokens.*seq_len \+ 1 = 33"):
        run(model, TOKENS[:10])
    with pytest.raises(ValueError, match="eval_data has 10 tokens"):
        run(model, eval_data=TOKENS[:10])
    with pytest.raises(ValueError, match="eval_data or val_fraction"):
        run(model, eval_data=TOKENS, val_fraction=0.1)
    with pytest.raises(ValueError, match="vocabulary has 256"):
        run(model, TOKENS * 10)
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt: no such file"):
        run(model, tmp_path / "nothing.txt", tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match="no trainable parameter"):
        run(llama().requires_grad_(False))
    with pytest.raises(ValueError, match="no adapter to save"):
        run(llama(), out_dir=tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        run(model, out_dir=tmp_path)
    with pytest.raises(ValueError, match="gradient_checkpointing: Embedding has no"):
        run(nn.Embedding(256, 256), gradient_checkpointing=True)


def test_the_whole_model_can_be_trained_and_saved_by_another_function(tmp_path: Path) -> None:
    model = llama()
    report = run(model, out_dir=tmp_path / "out", save=lambda m, directory: m.save_pretrained(directory), plot=False)
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters())
    assert report.plot_path is None
    assert (tmp_path / "out" / "adapter" / "model.safetensors").is_file()


def test_lines_away_from_a_terminal_and_a_bar_on_one() -> None:
    plain = io.StringIO()
    with Display(20, 10, console=Console(file=plain, width=200)) as display:
        for step in range(1, 21):
            display.step(step, 1.25, 1000.0, 2_000_000_000)
    lines = plain.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/20", "10/20", "20/20"]
    assert "loss 1.2500  1,000 tokens/s  2.00 GB" in lines[0] and lines[-1].endswith("0 s left")

    terminal = io.StringIO()
    with Display(2, 1, console=Console(file=terminal, width=200, force_terminal=True)) as display:
        display.step(2, 1.25, 1000.0, None)
        display.say("hello")
    assert "memory" not in terminal.getvalue() and "unknown" in terminal.getvalue() and "hello" in terminal.getvalue()

    silent = io.StringIO()
    with Display(1, 1, enabled=False, console=Console(file=silent)) as display:
        display.step(1, 1.0, 1.0, None)
        display.say("hello")
    assert silent.getvalue() == ""


def test_metrics_never_hold_what_json_does_not_know(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write("step", loss=1.5)
    metrics.write("eval", loss=800.0, perplexity=float("inf"))
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"kind": "step", "loss": 1.5}, {"kind": "eval", "loss": 800.0, "perplexity": None}]


def test_memory_is_in_bytes() -> None:
    now, peak = memory_bytes(), peak_memory_bytes()
    assert now is not None and peak is not None
    assert 50e6 < now <= 1.1 * peak < 1e12


def test_public_names() -> None:
    assert nybble.finetune is finetune and nybble.TrainConfig is TrainConfig
