"""Modules that an adapter trains in full: copies beside a frozen base, each acting with its adapter."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from checkpoint.conftest import llama
from nn.test_whole_models import IDS, Model
from torch import Tensor, nn
from torch.nn import functional

import nybble
from nybble import LoRAConfig, QuantConfig, add_lora, quantize_
from nybble.nn import LoRALinear, TrainedCopy
from nybble.nn.adapters import acting_parameters, adapter_parameters

TOKENS = torch.arange(24).reshape(3, 8)


def with_heads(tied: bool = False) -> Model:
    """Two adapters with q_proj updates, heads and norms of their own, both away from their start."""
    model = Model(tied=tied)
    for name in ("one", "two"):
        add_lora(model, r=2, target="q_proj", modules_to_save=("lm_head", "norm"), name=name)
        with torch.no_grad():
            for parameter in adapter_parameters(model, name).values():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_a_new_copy_changes_nothing_and_trains_in_full() -> None:
    model = Model(tied=True)
    before = model(IDS)
    report = add_lora(model, r=2, target="q_proj", modules_to_save=("lm_head", "norm"))
    assert torch.equal(model(IDS), before)
    assert isinstance(model.lm_head, TrainedCopy)
    trained = {name for name in acting_parameters(model) if "q_proj" not in name}
    assert trained == {
        "lm_head.adapters.default.module.weight",
        "norm.adapters.default.module.weight",
        "norm.adapters.default.module.bias",
    }
    assert report.trainable == 2 * 2 * (16 + 16) + 11 * 16 + 2 * 16
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in acting_parameters(model).values())
    assert model.embedding.weight.grad is None and not model.embedding.weight.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_heads_are_swapped_with_their_adapters(tied: bool) -> None:
    model = with_heads(tied)
    base = Model(tied=tied)
    outputs = {}
    for name in ("one", "two", None):
        nybble.set_adapter(model, name)
        outputs[name] = model(IDS)
        hidden = torch.randn(2, 16)
        weight = base.lm_head.weight if name is None else model.lm_head.copy_of(name).weight
        assert torch.equal(model.lm_head(hidden), functional.linear(hidden, weight))
    assert torch.equal(outputs[None], base(IDS))
    assert not torch.equal(outputs["one"], outputs["two"])
    assert model.lm_head.base.weight is (model.embedding.weight if tied else model.lm_head.base.weight)
    nybble.set_adapter(model, ["two", "one"])
    mixed = model(IDS)
    torch.testing.assert_close(mixed[0], outputs["two"][0])
    torch.testing.assert_close(mixed[1], outputs["one"][1])
    nybble.delete_adapter(model, "one")
    nybble.delete_adapter(model, "two")
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model(IDS), base(IDS))


def test_gradients_of_mixed_rows_are_those_of_runs_alone() -> None:
    model = with_heads()
    rows = ("two", None, "one", "two")
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))

    def gradients(which: object, ids: Tensor) -> dict[str, Tensor]:
        nybble.set_adapter(model, which)
        model.zero_grad()
        functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="sum").backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    mixed = gradients(rows, ids)
    alone = gradients("two", ids[[0, 3]]) | gradients("one", ids[[2]])
    assert mixed.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(mixed[name], value, rtol=1e-4, atol=1e-5)


def test_attributes_are_those_of_the_copy_that_acts() -> None:
    model = with_heads()
    nybble.set_adapter(model, "two")
    head = model.lm_head
    assert head.weight is head.copy_of("two").weight
    assert (head.in_features, head.out_features, head.bias) == (16, 11, None)
    for which in (None, ["one", "two"]):
        nybble.set_adapter(model, which)
        assert head.weight is head.base.weight
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'nothing'"):
        _ = head.nothing
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        nybble.set_adapter(other, "one")
        assert torch.equal(other.lm_head.weight, head.copy_of("one").weight)


def test_another_adapter_may_have_a_low_rank_update_where_one_has_a_copy() -> None:
    for first_copy in (True, False):
        model = Model()
        before = model(IDS)
        hidden = torch.randn(2, 16)
        for name in ("own", "low_rank") if first_copy else ("low_rank", "own"):
            if name == "own":
                add_lora(model, r=2, target="q_proj", modules_to_save=("lm_head",), name=name)
            else:
                add_lora(model, r=2, target=("q_proj", "lm_head"), name=name)
            assert torch.equal(model(IDS), before)
        with torch.no_grad():
            for name in ("own", "low_rank"):
                for parameter in adapter_parameters(model, name).values():
                    parameter.add_(1.0)
        weight = Model().lm_head.weight
        nybble.set_adapter(model, "own")
        torch.testing.assert_close(model.lm_head(hidden), hidden @ (weight + 1.0).T)
        update = model.lm_head.base
        assert isinstance(update, LoRALinear)
        nybble.set_adapter(model, "low_rank")
        torch.testing.assert_close(model.lm_head(hidden), hidden @ (weight + update.delta_weight()).T)
        assert not any("lora" in name for name, _ in model.lm_head.copy_of("own").named_parameters())
        nybble.set_adapter(model, None)
        assert torch.equal(model(IDS), before)


def test_layers_inside_a_copied_module_get_no_update() -> None:
    model = Model()
    report = add_lora(model, r=2, modules_to_save=("blocks.1",))
    assert report.targets == [f"blocks.0.{name}" for name in ("q_proj", "mlp.up_proj", "mlp.down_proj")]
    assert isinstance(model.blocks[1], TrainedCopy)
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in model.blocks[1].copy_of("default").parameters())


def test_a_quantized_head_is_refused() -> None:
    model = Model()
    quantize_(model, QuantConfig(skip=()))
    with pytest.raises(TypeError, match="modules_to_save: lm_head is quantized, and cannot be trained in full"):
        add_lora(model, r=2, modules_to_save=("lm_head",))
    assert all(p.requires_grad for p in model.norm.parameters())


def test_a_module_with_several_inputs_cannot_be_mixed() -> None:
    module = TrainedCopy.from_base(nn.Bilinear(3, 3, 2))
    x = torch.randn(2, 3)
    assert module(x, x).shape == (2, 2)
    nybble.set_adapter(module, ["default", None])
    with pytest.raises(TypeError, match=r"a Bilinear of which adapters have copies: .* it takes exactly one tensor"):
        module(x, x)


def test_compiled_as_one_graph() -> None:
    model = with_heads()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for which in ("one", None, ["two", "one"]):
        nybble.set_adapter(model, which)
        torch.testing.assert_close(compiled(IDS), model(IDS))
    torch.compiler.reset()


@pytest.mark.parametrize("tied", [False, True])
def test_a_transformers_model_with_heads_by_adapter(tied: bool) -> None:
    model = llama(dtype=torch.float32, tied=tied)
    quantize_(model)
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
    for name in ("one", "two"):
        add_lora(model, LoRAConfig(r=2, modules_to_save=("lm_head",)), name=name)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5 if name == "one" else 0.5)
    assert model.get_output_embeddings() is model.lm_head
    assert (model.lm_head.base.weight is model.get_input_embeddings().weight) == tied
    for which, factor in (("one", 1.5), ("two", 0.5), (None, 1.0)):
        nybble.set_adapter(model, which)
        torch.testing.assert_close(model(input_ids=TOKENS).logits, factor * before)
    nybble.set_adapter(model, ["two", None, "one"])
    factors = torch.tensor([0.5, 1.0, 1.5])[:, None, None]
    torch.testing.assert_close(model(input_ids=TOKENS).logits, factors * before)


@pytest.mark.parametrize("head", ["copy", "update"])
def test_the_loss_by_chunks_trains_the_head_of_the_adapter_that_acts(head: str) -> None:
    from nybble.training.loss import chunked_cross_entropy, find_split

    model = llama(dtype=torch.float32, tied=True)
    for name in ("idle", "acting"):
        options = {"modules_to_save": ("lm_head",)} if head == "copy" else {"target": ("q_proj", "lm_head")}
        add_lora(model, LoRAConfig(r=2, **options), name=name)
    split = find_split(model)
    assert split is not None and split[1] is model.lm_head
    decoder, found = split
    hidden = decoder(input_ids=TOKENS).last_hidden_state.flatten(0, 1)
    loss = chunked_cross_entropy(hidden, found, TOKENS.flatten(), chunk=5)
    loss.backward()
    grads = {name: p.grad for name, p in found.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert grads and all(".acting." in f".{name}" for name in grads)
    model.zero_grad()
    logits = model(input_ids=TOKENS).logits
    functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten(), reduction="sum").backward()
    for name, parameter in found.named_parameters():
        if name in grads:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-4)
