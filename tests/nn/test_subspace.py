"""A model that moves in a random subspace: the values that its modules see, its gradients, what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_models import bert, ids, llama

import nybble
from nybble.nn.subspace import add_subspace
from nybble.training import TextClassifier, TrainConfig, finetune
from nybble.training.data import Labelled


def classifier(encoder: Any = None) -> TextClassifier:
    model = TextClassifier(bert() if encoder is None else encoder, 3)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model


def move(subspace: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        subspace.z.copy_(torch.randn(subspace.z.shape, generator=generator) * 0.5)
        if subspace.scales is not None:
            subspace.scales.add_(torch.randn(subspace.scales.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("structure", [False, True])
def test_it_starts_as_the_model_and_computes_with_moved_weights(structure: bool) -> None:
    model = classifier()
    plain = copy.deepcopy(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    subspace = add_subspace(model, 40, structure=structure)
    assert torch.equal(model(ids()), plain(ids()))
    move(subspace)
    values = dict(zip(subspace.names, subspace.values(), strict=True))
    assert values.keys() == before.keys()
    moved = torch.cat([(values[name] - before[name]).reshape(-1) for name in before])
    assert moved.count_nonzero() > 0.99 * moved.numel()
    expected = torch.func.functional_call(plain, values, (ids(),))
    assert torch.equal(model(ids()), expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 40
    ours = torch.autograd.grad(model(ids()).square().sum(), trained)
    theirs = torch.autograd.grad(expected.square().sum(), trained)
    assert all(torch.equal(a, b) and a.count_nonzero() == a.numel() for a, b in zip(ours, theirs, strict=True))
    # The model's own parameters are as they were, and no shadow of them is left.
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert model.head.weight is dict(model.named_parameters())["head.weight"]


def test_scales_count_as_dimensions_and_act_on_their_blocks() -> None:
    model = classifier()
    subspace = add_subspace(model, 40, structure=True)
    assert subspace.groups == ["encoder.embeddings", "encoder.encoder.layer.0", "encoder.encoder.layer.1", "head"]
    assert subspace.z.numel() == 36
    move(subspace)
    before = subspace.values()
    with torch.no_grad():
        subspace.scales[1] = 0  # this block does not move any more
        after = subspace.values()
    for name, old, new, parameter in zip(subspace.names, before, after, subspace._parameters_of, strict=True):
        assert torch.equal(new, parameter if ".layer.0." in name else old)


def test_a_scale_moves_by_its_step() -> None:
    plain, slow = (add_subspace(classifier(), 40, structure=True, scale_step=step) for step in (1.0, 0.25))
    for subspace, change in ((plain, 0.5), (slow, 2.0)):
        with torch.no_grad():
            subspace.z.copy_(torch.linspace(-1, 1, 36))
            subspace.scales.add_(change)
    assert all(torch.equal(a, b) for a, b in zip(plain.values(), slow.values(), strict=True))
    for step in (0.0, -1, math.inf, True):
        with pytest.raises(ValueError, match=f"scale_step must be a number above 0, got {step}"):
            add_subspace(classifier(), 40, structure=True, scale_step=step)


def test_evaluations_keep_the_values_until_they_change() -> None:
    model = classifier()
    subspace = add_subspace(model, 10)
    with torch.no_grad():
        first = subspace.values()
        assert subspace.values()[0] is first[0]
        subspace.z.add_(1)
        assert not torch.equal(subspace.values()[0], first[0])
        moved = model(ids())
    assert torch.equal(model(ids()), moved)


def test_tied_weights_move_as_one() -> None:
    model = llama()  # the head has the embedding's table
    subspace = add_subspace(model, 10)
    assert "lm_head.weight" not in subspace.names
    move(subspace)
    value = subspace.values()[subspace.names.index("model.embed_tokens.weight")]
    plain = llama()
    with torch.no_grad():
        for name, moved in zip(subspace.names, subspace.values(), strict=True):
            plain.get_parameter(name).copy_(moved)
        assert torch.equal(plain.lm_head.weight, value)
        assert torch.equal(model(input_ids=ids()).logits, plain(input_ids=ids()).logits)


def test_a_copy_has_a_subspace_of_its_own() -> None:
    model = classifier()
    move(add_subspace(model, 10))
    other = copy.deepcopy(model)
    assert torch.equal(other(ids()), model(ids()))
    with torch.no_grad():
        other.subspace.z.zero_()
    assert torch.equal(other(ids()), classifier()(ids()))
    assert not torch.equal(other(ids()), model(ids()))


def test_an_error_in_the_forward_leaves_the_parameters() -> None:
    model = classifier()
    add_subspace(model, 10)
    with pytest.raises(IndexError):
        model(torch.tensor([[999]]))
    assert isinstance(model.head.weight, torch.nn.Parameter)


@pytest.mark.parametrize("fused", [True, False])
def test_the_loop_trains_it(fused: bool) -> None:
    data = Labelled(torch.arange(1, 61, dtype=torch.int32), torch.arange(0, 61, 5), torch.arange(12) % 3, (0, 1, 2))
    model = classifier()
    subspace = add_subspace(model, 60, exclude=("head.weight", "head.bias"))
    config = TrainConfig(steps=30, batch_size=12, seq_len=5, lr=0.05, warmup_steps=1, dtype="fp32", fused=fused)
    before = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("subspace.")}
    model.head.requires_grad_(False)
    report = finetune(model, data, config, show=False)
    assert report.trainable_parameters == 60
    assert report.losses[-1] < 0.8 * report.losses[0]
    assert subspace.z.count_nonzero() == 60
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_what_cannot_move_is_refused() -> None:
    model = classifier()
    for dims, structure, text in (
        (0, False, "dims must be an integer of at least 1"),
        (10**9, False, "dims must be at most size"),
        (4, True, r"dims must be above 4, one scale for each of the model's 4 parts \(structure=True\); got 4"),
    ):
        with pytest.raises(ValueError, match=text):
            add_subspace(model, dims, structure=structure)
        assert not hasattr(model, "subspace") and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="exclude: 'body' is no parameter of the model"):
        add_subspace(model, 5, exclude=("body",))
    with pytest.raises(ValueError, match="exclude: no parameter is left"):
        add_subspace(model, 5, exclude=tuple(dict(model.named_parameters())))
    add_subspace(model, 5)
    with pytest.raises(ValueError, match="it has a 'subspace' already"):
        add_subspace(model, 5)
    quantized = bert()
    nybble.quantize_(quantized)
    with pytest.raises(ValueError, match="is quantized; a subspace is for the parameters of a plain model"):
        add_subspace(classifier(quantized), 5)
    adapted = llama()
    nybble.add_lora(adapted, r=2)
    with pytest.raises(ValueError, match="it has the adapter 'default'"):
        add_subspace(adapted, 5)
    with pytest.raises(ValueError, match=r"has dtype torch.bfloat16; load it in torch.float32"):
        add_subspace(llama(torch.bfloat16), 5)


def test_gradient_checkpointing_is_refused() -> None:
    model = llama()
    add_subspace(model, 5)
    model.train()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    with pytest.raises(ValueError, match="does not go with gradient checkpointing"):
        model(input_ids=ids())
