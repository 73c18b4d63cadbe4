"""transformers models under lean_attention: the same outputs, the same gradients, nothing left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nybble.nn import sdpa as module
from nybble.training.lean_attention import lean_attention

transformers = pytest.importorskip("transformers")
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402


def decoder(kv_heads: int = 2, **settings: object) -> torch.nn.Module:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        attn_implementation="sdpa",
        **settings,
    )
    return transformers.LlamaForCausalLM(config).train()


def encoder() -> torch.nn.Module:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return transformers.BertForMaskedLM(config).train()


IDS = torch.arange(2 * 37).view(2, 37) % 61
PADDED = torch.ones(2, 37, dtype=torch.long)
PADDED[0, :6] = 0
DOCUMENTS = torch.ones(37, 37, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
DOCUMENTS[:, :, 20:, :20] = False


def gradients(model: torch.nn.Module, mask: Tensor | None, inside: contextlib.AbstractContextManager) -> list[Tensor]:
    model.zero_grad()
    with inside:
        loss = model(input_ids=IDS, attention_mask=mask, labels=IDS).loss
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def backward_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    calls: list[tuple] = []
    backward = module.attention_backward

    def counted(*args: object) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(args)
        return backward(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "attention_backward", counted)
    return calls


@pytest.mark.parametrize("build", (decoder, lambda: decoder(4), encoder), ids=("gqa", "decoder", "encoder"))
@pytest.mark.parametrize("mask", (None, PADDED, DOCUMENTS), ids=("none", "padded", "documents"))
@pytest.mark.parametrize("again", (False, True), ids=("kept", "recomputed"))
def test_gradients_are_the_same(
    build: Callable[[], torch.nn.Module], mask: Tensor | None, again: bool, backward_calls: list[tuple]
) -> None:
    model = build()
    if again:
        for layer in model.modules():
            if hasattr(layer, "gradient_checkpointing"):
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = lambda run, *args, **kwargs: torch.utils.checkpoint.checkpoint(
                    run, *args, use_reentrant=False, **kwargs
                )
    expected = gradients(model, mask, contextlib.nullcontext())
    assert not backward_calls
    found = gradients(model, mask, lean_attention())
    assert len(backward_calls) == 2
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found[1:], expected[1:], strict=True):
        # fp32 in another order, through two layers; a key's bias has no gradient but for rounding.
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-7


def test_dropout_is_torchs(backward_calls: list[tuple]) -> None:
    model = decoder(attention_dropout=0.5)
    torch.manual_seed(1)
    expected = gradients(model, None, contextlib.nullcontext())
    torch.manual_seed(1)
    found = gradients(model, None, lean_attention())
    assert not backward_calls and all(map(torch.equal, found, expected))


def test_without_a_gradient_nothing_is_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.training import lean_attention as file

    monkeypatch.setattr(file, "_Redirected", None)
    model = decoder()
    with torch.no_grad(), lean_attention():
        found = model(IDS).logits
    with torch.no_grad():
        assert torch.equal(found, model(IDS).logits)


def test_what_was_there_is_there_again() -> None:
    before, local = ALL_ATTENTION_FUNCTIONS["sdpa"], dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    with pytest.raises(KeyError), lean_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
        with lean_attention():
            pass
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == local


def test_anothers_function_is_kept(backward_calls: list[tuple]) -> None:
    library, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def own(*args: object, **kwargs: object) -> object:
        seen.append(args)
        return library(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        gradients(decoder(), None, lean_attention())
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert len(seen) == 2 and len(backward_calls) == 2


def test_a_function_set_within_stays() -> None:
    def own() -> None: ...

    try:
        with lean_attention():
            ALL_ATTENTION_FUNCTIONS["sdpa"] = own
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("again", [False, True])
def test_the_loop_trains_with_this_gradient(dtype: str, again: bool, backward_calls: list[tuple]) -> None:
    from tiny import TEXT, llama

    from nybble import TrainConfig, add_lora, finetune

    model = llama()
    add_lora(model, r=4, alpha=8)
    config = TrainConfig(steps=2, batch_size=2, seq_len=32, dtype=dtype, gradient_checkpointing=again)
    finetune(model, torch.tensor(list(TEXT.encode())), config, show=False)
    assert len(backward_calls) == 2 * model.config.num_hidden_layers
