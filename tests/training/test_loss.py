"""The chunked loss is the loss: value and gradients, with frozen and trainable heads; perplexity is its exponential."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CONTEXT, TEXT, llama
from torch import Tensor, nn

from nybble import LoRAConfig, QuantConfig, QuantLinear, add_lora
from nybble.training import perplexity
from nybble.training.loss import IGNORE, CausalLoss, chunked_cross_entropy, find_split

TOKENS = torch.tensor(list(TEXT.encode()))


def full_loss(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
@pytest.mark.parametrize("trainable", [True, False])
def test_value_and_gradients_equal_the_full_loss(chunk: int, trainable: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50).requires_grad_(trainable)
    targets = torch.randint(50, (64,))
    targets[::5] = IGNORE
    hidden = torch.randn(64, 16, requires_grad=True)
    inputs = [hidden, *(p for p in head.parameters() if trainable)]
    expected = full_loss(hidden, head, targets)
    expected_grads = torch.autograd.grad(3.0 * expected, inputs)
    loss = chunked_cross_entropy(hidden, head, targets, chunk)
    grads = torch.autograd.grad(3.0 * loss, inputs)
    # Only the order of fp32 sums of 64 terms differs.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_a_quantized_head_gives_the_hidden_states_their_gradient() -> None:
    torch.manual_seed(0)
    head = QuantLinear.from_linear(nn.Linear(64, 50), QuantConfig())
    hidden = torch.randn(10, 64, requires_grad=True)
    targets = torch.randint(50, (10,))
    (expected,) = torch.autograd.grad(full_loss(hidden, head, targets), hidden)
    (grad,) = torch.autograd.grad(chunked_cross_entropy(hidden, head, targets, 4), hidden)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_ignored_targets_alone_give_zero_and_no_gradient() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, nn.Linear(8, 5), torch.full((4,), IGNORE), 2)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and not hidden.grad.any()


def test_a_certain_prediction_has_a_finite_loss_whatever_its_probability() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [500.0]]))  # p of class 0 is e^-500: 0 in fp32
    assert chunked_cross_entropy(hidden, head, torch.tensor([0])).item() == 500.0


@pytest.mark.parametrize("tied", [True, False])
def test_whole_model_gradients_equal_those_of_its_own_logits(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    loss = CausalLoss(model, chunk=10)
    assert loss.split is not None
    ids, targets = TOKENS[:66].view(2, 33)[:, :-1], TOKENS[:66].view(2, 33)[:, 1:]
    value = loss(ids, targets)
    grads = torch.autograd.grad(value, list(model.parameters()))
    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-4)


def test_only_a_chunk_of_logits_exists_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    loss = CausalLoss(model, chunk=16)
    rows.clear()
    loss(TOKENS[:100].view(2, 50), TOKENS[1:101].view(2, 50)).backward()
    assert rows == [16] * 6 + [4]


class Capped(nn.Module):
    """A model that does more after its head than apply it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()
        self.model = self.inner.model
        self.base_model_prefix = "model"

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, input_ids: Tensor) -> Any:
        output = self.inner(input_ids)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output


class Bigram(nn.Module):
    """Ids to logits as a plain tensor; no decoder, no head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 256)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


@pytest.mark.parametrize("model", [Capped(), Bigram()], ids=["capped", "bigram"])
def test_a_model_without_a_faithful_split_uses_its_own_logits(model: nn.Module) -> None:
    assert find_split(model) is None
    ids, targets = TOKENS[None, :40], TOKENS[None, 1:41]
    output = model(ids)
    logits = output if isinstance(output, Tensor) else output.logits
    expected = F.cross_entropy(logits[0].float(), targets[0], reduction="sum")
    torch.testing.assert_close(CausalLoss(model)(ids, targets), expected)


def test_wrong_shapes_and_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[4, 8\] and \[3\]"):
        chunked_cross_entropy(torch.zeros(4, 8), nn.Linear(8, 5), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        CausalLoss(Bigram(), 0)


@pytest.mark.parametrize("window, batch_size", [(32, 1), (32, 3), (50, 2), (CONTEXT, 4)])
def test_perplexity_is_the_direct_computation(window: int, batch_size: int) -> None:
    model = llama()
    tokens, total, count = TOKENS[:500], 0.0, 0
    with torch.no_grad():
        for start in range(0, 500 - window + 1, window):
            part = tokens[start : start + window]
            log_p = model(part[None]).logits[0].double().log_softmax(-1)
            total -= log_p[:-1].gather(1, part[1:, None]).sum().item()
            count += window - 1
    found = perplexity(model, tokens, window, batch_size=batch_size)
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_leaves_the_mode_as_it_was_and_measures_without_dropout() -> None:
    model = llama()
    expected = perplexity(model, TOKENS, 64)
    add_lora(model, LoRAConfig(r=4, dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.train()
    first, second = perplexity(model, TOKENS, 64), perplexity(model, TOKENS, 64)
    assert model.training and first == second != expected


def test_perplexity_refuses_what_it_cannot_measure() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"window=129 .*max_position_embeddings=128"):
        perplexity(model, TOKENS, CONTEXT + 1)
    with pytest.raises(ValueError, match="31 are fewer than one window of 32"):
        perplexity(model, TOKENS[:31], 32)
    with pytest.raises(ValueError, match="window must be at least 2 tokens, got 1"):
        perplexity(model, TOKENS, 1)
    with pytest.raises(ValueError, match="vocabulary has 256"):
        perplexity(model, TOKENS + 200, 32)
