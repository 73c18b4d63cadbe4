"""The chunked loss is the loss: value and gradients, with frozen and trainable heads; perplexity is its exponential."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import CONTEXT, TEXT, llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nybble import LoRAConfig, QuantConfig, QuantLinear, add_lora
from nybble.nn.adapters import set_adapter
from nybble.training import perplexity
from nybble.training.data import IGNORE, Batch, Rows, make_examples, pack
from nybble.training.evaluate import mean_loss
from nybble.training.loss import CausalLoss, chunked_cross_entropy, find_split

TOKENS = torch.tensor(list(TEXT.encode()))


def windows(rows: int, length: int) -> Batch:
    """The first rows * length tokens and the one after each."""
    count = rows * length
    return Batch(TOKENS[:count].view(rows, length), TOKENS[1 : count + 1].view(rows, length).clone())


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
    batch = windows(2, 33)
    value = loss(batch)
    grads = torch.autograd.grad(value, list(model.parameters()))
    expected = F.cross_entropy(model(batch.ids).logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
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
    loss(windows(2, 50)).backward()
    assert rows == [16] * 6 + [4]


class Largest(TorchDispatchMode):
    """Size of the largest tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        self.size = max([self.size, *(o.numel() for o in outputs if isinstance(o, Tensor))])
        return output


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_nothing_larger_than_a_chunk_of_logits_is_ever_made(quantized: bool, trained: bool) -> None:
    torch.manual_seed(0)
    head: nn.Module = nn.Linear(32, 4096, bias=False).requires_grad_(trained)
    if quantized:
        head = QuantLinear.from_linear(head, QuantConfig())
    hidden = torch.randn(200, 32, requires_grad=True)
    with Largest() as largest:
        chunked_cross_entropy(hidden, head, torch.randint(4096, (200,)), 40).backward()
    assert largest.size == max(40 * 4096, 4096 * 32)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("head", ["linear", "quantized", "lora"])
def test_the_head_is_applied_to_predicted_tokens_alone(head: str, trained: bool) -> None:
    torch.manual_seed(0)
    linear: nn.Module = nn.Linear(64, 50).requires_grad_(trained)
    if head == "quantized":
        linear = QuantLinear.from_linear(linear, QuantConfig())
    if head == "lora":
        holder = nn.ModuleDict({"lm_head": linear})
        add_lora(holder, LoRAConfig(r=4, target=("lm_head",)))
        linear = holder["lm_head"]
        with torch.no_grad():
            for parameter in linear.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
    targets = torch.full((60,), IGNORE)
    targets[[3, 10, 11, 40, 59]] = torch.randint(50, (5,))
    hidden = torch.randn(60, 64, requires_grad=True)
    inputs = [hidden, *(p for p in linear.parameters() if p.requires_grad)]
    expected = full_loss(hidden, linear, targets)
    wanted = torch.autograd.grad(expected, inputs)
    rows: list[int] = []
    hook = linear.register_forward_hook(lambda module, given, output: rows.append(output.shape[0]))
    for chunk in (2, 64):
        rows.clear()
        found = chunked_cross_entropy(hidden, linear, targets, chunk)
        assert rows == ([2, 2, 1] if chunk == 2 else [5])
        torch.testing.assert_close(found, expected)
        for grad, want in zip(torch.autograd.grad(found, inputs), wanted, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)
    hook.remove()
    found = chunked_cross_entropy(hidden, linear, targets, 2)
    for grad, want in zip(torch.autograd.grad(found, inputs), wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_near_to_fp32_as_the_full_loss_in_bfloat16(trained: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 300, bias=False)
    hidden, targets = torch.randn(200, 64), torch.randint(300, (200,))
    targets[::4] = IGNORE
    exact = torch.autograd.grad(full_loss(hidden.requires_grad_(), head, targets), [hidden, head.weight])
    if not autocast:
        head, hidden = head.bfloat16(), hidden.detach().bfloat16().requires_grad_()
    head.requires_grad_(trained)
    inputs = [hidden, head.weight] if trained else [hidden]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        full = torch.autograd.grad(full_loss(hidden, head, targets), inputs)
        found = torch.autograd.grad(chunked_cross_entropy(hidden, head, targets, 16), inputs)
    for grad, reference, true in zip(found, full, exact, strict=False):
        assert grad.dtype == reference.dtype
        # Both round logits, their gradient and products to 8 bits; chunks are summed in fp32, so no error adds up.
        assert float((grad - true).norm()) <= 1.2 * float((reference - true).norm()) + 1e-6


def test_parameters_of_adapters_that_do_not_act_get_no_gradient() -> None:
    holder = nn.ModuleDict({"lm_head": nn.Linear(16, 20)})
    add_lora(holder, LoRAConfig(r=2, target=("lm_head",)), name="one")
    add_lora(holder, LoRAConfig(r=2, target=("lm_head",)), name="two")
    hidden = torch.randn(6, 16, requires_grad=True)
    chunked_cross_entropy(hidden, holder["lm_head"], torch.randint(20, (6,)), 4).backward()
    acting = {name: p.grad is not None for name, p in holder.named_parameters() if p.requires_grad}
    assert any(acting.values()) and all(has == (".two." in name) for name, has in acting.items())


def test_running_backward_twice_is_an_error_not_a_wrong_gradient() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, nn.Linear(8, 5), torch.zeros(4, dtype=torch.int64))
    (2.0 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
    batch = windows(1, 40)
    batch.targets[0, 3] = IGNORE
    output = model(batch.ids)
    logits = output if isinstance(output, Tensor) else output.logits
    expected = F.cross_entropy(logits[0].float(), batch.targets[0], reduction="sum")
    torch.testing.assert_close(CausalLoss(model)(batch), expected)


@pytest.mark.parametrize(
    "kind, setting",
    [
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_what_a_model_does_to_its_logits_is_part_of_the_head(kind: str, setting: dict[str, float]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 256, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads, **setting)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert find_split(model) is not None
    loss, batch = CausalLoss(model, 7)(windows(1, 40)), windows(1, 40)
    expected = F.cross_entropy(model(batch.ids).logits[0], batch.targets[0], reduction="sum")
    torch.testing.assert_close(loss, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for grad, want in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_the_split_is_found_with_adapters_on_decoder_and_head_and_rows_of_several() -> None:
    model = llama(tie_word_embeddings=False)
    for name in ("a", "b"):
        add_lora(model, LoRAConfig(r=2, target=("*_proj", "lm_head")), name=name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.requires_grad or "lora" in path:
                parameter.normal_(std=0.2)
    set_adapter(model, ["b", "a", "b"])
    assert find_split(model) is not None
    batch = windows(3, 20)
    set_adapter(model, "a")
    expected = F.cross_entropy(model(batch.ids[1:2]).logits[0], batch.targets[1], reduction="sum")
    torch.testing.assert_close(CausalLoss(model)(batch.part(1, 2)), expected, rtol=1e-4, atol=1e-3)


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


def test_the_mean_loss_is_over_targets_that_count() -> None:
    model = llama()
    data = [list(TEXT.encode()[i : i + n]) for i, n in ((0, 30), (40, 9), (60, 17), (99, 50))]
    expected = [
        F.cross_entropy(model(torch.tensor([ids[:-1]])).logits[0], torch.tensor(ids[1:]), reduction="sum").item()
        for ids in data
    ]
    count = sum(len(ids) - 1 for ids in data)
    for packing in ("documents", "none"):
        rows = pack(make_examples(data), 64, packing)[0]
        for batch_size in (1, 3):
            assert mean_loss(model, rows, batch_size=batch_size) == pytest.approx(sum(expected) / count, rel=1e-5)
    with pytest.raises(ValueError, match="rows is empty"):
        mean_loss(model, Rows.windows(TOKENS[None, :5]).part(0, 0))
    with pytest.raises(ValueError, match="targets: token ids run from 300 to 300"):
        mean_loss(model, Rows(torch.tensor([[1]]), torch.tensor([[300]])))


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
