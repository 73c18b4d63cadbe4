"""Comparing two models: what is known of equal ones, and what the figures are by their definition."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXT, llama, transformers, write_model
from torch import nn
from typer.testing import CliRunner

import nybble
from nybble.cli.app import build
from nybble.training.evaluate import perplexity

TOKENS = torch.randint(1, 256, (200,), generator=torch.Generator().manual_seed(3))


def test_a_model_beside_itself() -> None:
    model = llama()
    found = nybble.compare(model, model, TOKENS, 32)
    assert found.kl == found.kl_99 == 0.0 and found.top1 == 1.0 and found.tokens == 6 * 31
    assert found.perplexity_a == found.perplexity_b == pytest.approx(perplexity(model, TOKENS, 32), rel=1e-5)
    assert [row.relative_error for row in found.layers] == [0.0, 0.0]


def test_figures_are_by_their_definition() -> None:
    a, b = llama(seed=0), llama(seed=1)
    b.load_state_dict({k: v + 0.02 * torch.randn_like(v) for k, v in a.state_dict().items()})
    found = nybble.compare(a, b, TOKENS[:64], 32)
    rows = TOKENS[:64].view(2, 32)
    with torch.no_grad():
        p, q = (torch.log_softmax(m(rows).logits[:, :-1].double(), -1).flatten(0, 1) for m in (a, b))
        hidden = [m(rows, output_hidden_states=True).hidden_states[1].double() for m in (a, b)]
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.kl_99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.perplexity_b == pytest.approx(perplexity(b, TOKENS[:64], 32), rel=1e-5)
    error = float((hidden[0] - hidden[1]).norm() / hidden[0].norm())
    assert found.layers[0].relative_error == pytest.approx(error, rel=1e-4)
    assert nybble.compare(b, a, TOKENS[:64], 32).kl != pytest.approx(found.kl, rel=1e-6)  # it is not symmetric


@contextmanager
def ruling_out(model: Any, token: int, positions: slice = slice(None)) -> Iterator[Any]:
    """The model with the logit of a token at -inf, as models mask entries of their vocabulary."""

    def mask(module: nn.Module, given: Any, out: Any) -> None:
        out.logits[:, positions, token] = -math.inf

    hook = model.register_forward_hook(mask)
    try:
        yield model
    finally:
        hook.remove()


def test_tokens_that_a_model_rules_out() -> None:
    text = TOKENS[TOKENS != 7]
    plain, a, b = llama(), llama(), llama()
    with ruling_out(a, 7), ruling_out(b, 7):
        assert nybble.compare(a, b, text, 32).kl == 0.0
        # KL(p without a token || p) is -log(1 - p(token)).
        rows = text[:96].view(3, 32)
        with torch.no_grad():
            rest = 1 - plain(rows).logits[:, :-1].double().softmax(-1)[..., 7]
        assert nybble.compare(a, plain, text[:96], 32).kl == pytest.approx(float(-rest.log().mean()), rel=1e-3)
        found = nybble.compare(plain, b, text, 32)
        assert found.kl == found.kl_99 == math.inf and math.isfinite(found.perplexity_b)
    with ruling_out(b, 7, slice(5, 6)):  # at one position of the 31 in a window
        found = nybble.compare(plain, b, text[:96], 32)
    assert found.kl == found.kl_99 == math.inf and math.isfinite(nybble.compare(plain, b, text, 32).kl)


def test_a_layer_figure_is_of_the_block_itself() -> None:
    a = llama()
    b = copy.deepcopy(a)
    b.model.norm.weight.data.mul_(1.0 + torch.rand(64))
    found = nybble.compare(a, b, TOKENS, 32)
    assert found.kl > 0 and [row.relative_error for row in found.layers] == [0.0, 0.0]
    b.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)
    found = nybble.compare(a, b, TOKENS, 32)
    assert found.layers[0].relative_error == 0.0 < found.layers[1].relative_error


def test_layer_figures_need_one_stack_of_blocks_whatever_its_weights_are() -> None:
    a, b = llama(), llama()
    nybble.quantize_(a, nybble.QuantConfig("int8"))
    nybble.quantize_(b, nybble.QuantConfig("nf4"))
    assert [row.block for row in nybble.compare(a, b, TOKENS, 32).layers] == [0, 1]
    b.more = nn.ModuleList([nn.Linear(1, 1)])
    assert nybble.compare(a, b, TOKENS, 32).layers == []


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertLMHeadModel", "ModernBertForMaskedLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_causal_language_model_is_refused(kind: str, dtype: torch.dtype) -> None:
    config = getattr(transformers, f"{'ModernBert' if kind.startswith('Modern') else 'Bert'}Config")
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    torch.manual_seed(0)
    other = getattr(transformers, kind)(config(**small, **tokens, vocab_size=256, initializer_range=0.1)).to(dtype)
    for pair, name in (((other, llama()), "a"), ((llama(), other), "b")):
        with pytest.raises(ValueError, match=rf"^{name} is a {kind}; a causal language model is needed.*ForCausalLM"):
            nybble.compare(*pair, TOKENS, 32)


def test_an_expert_shared_by_tokens_is_no_look_ahead() -> None:
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(**settings, num_key_value_heads=2, num_local_experts=4, vocab_size=256)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    assert nybble.compare(model, model, TOKENS[:64], 32).kl == 0.0


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_models_and_tokens_on_different_devices() -> None:
    device = torch.accelerator.current_accelerator()
    here, there = llama(), llama().to(device)
    for pair in ((here, there), (there, here)):
        found = nybble.compare(*pair, TOKENS.to(device), 32)
        assert found.kl < 1e-4 and len(found.layers) == 2


def test_models_and_texts_that_do_not_go_together() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"vocabulary has 128"):
        nybble.compare(model, llama(vocab_size=128), TOKENS, 32)
    with pytest.raises(ValueError, match="the vocabularies differ: 256 and 300"):
        nybble.compare(model, llama(vocab_size=300), TOKENS, 32)
    with pytest.raises(ValueError, match="fewer than one window"):
        nybble.compare(model, model, TOKENS[:10], 32)
    with pytest.raises(ValueError, match="longer than the model's context"):
        nybble.compare(model, model, TOKENS, 129)


def test_on_the_command_line(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", torch.bfloat16)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    run = CliRunner().invoke
    done = run(
        build(),
        f"quantize {source} {tmp_path / 'q'} --calibrate {text} --samples 4 --seq 64 --report {tmp_path / 'r.json'}",
    )
    assert done.exit_code == 0, done.output
    assert "mean error of outputs, calibrated" in done.output
    rows = json.loads((tmp_path / "r.json").read_text())["tensors"]
    assert all(row["output_error"] < row["output_error_plain"] for row in rows)
    done = run(build(), f"quantize {source} {tmp_path / 'plain'}")
    assert done.exit_code == 0, done.output
    kl = {}
    for name in ("q", "plain"):
        report = tmp_path / f"{name}.json"
        done = run(
            build(),
            f"compare {source} {tmp_path / name} --text {text} --window 64 --report {report}",
        )
        assert done.exit_code == 0, done.output
        assert "same likeliest token" in done.output
        kl[name] = json.loads(report.read_text())["kl"]
        assert report.with_suffix(".png").stat().st_size > 1000
    assert math.isfinite(kl["q"]) and kl["q"] < kl["plain"]


def test_tokenizers_of_different_lengths_on_the_command_line(tmp_path: Path) -> None:
    a, b = (write_model(tmp_path / name) for name in "ab")
    settings = json.loads((b / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": "the"}, "content": ""}
    (b / "tokenizer.json").write_text(json.dumps(settings))
    (tmp_path / "text.txt").write_text(TEXT)
    done = CliRunner().invoke(build(), f"compare {a} {b} --text {tmp_path / 'text.txt'} --window 64")
    assert isinstance(done.exception, ValueError) and "have different tokenizers" in str(done.exception)
