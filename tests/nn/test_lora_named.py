"""Several adapters on one model: what is added, what acts, what trains, and what goes away again."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from nn.layers import linear, quant_linear
from nn.test_whole_models import IDS, INNER, Model
from torch import Tensor, nn
from torch.nn import functional

import nybble
from nybble import LoRAConfig, LoRALinear, add_lora, quantize_
from nybble.errors import PatternError
from nybble.nn import LoRAEmbedding, init_from_residual
from nybble.nn.adapters import acting_parameters, adapter_parameters


def randomize(model: nn.Module, name: str, seed: int) -> None:
    """Give an adapter values as they may be after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def two_adapters(quantized: bool = True) -> tuple[Model, Tensor]:
    """A model with adapters of different layers, ranks and kinds, both trained; and the base's output."""
    model = Model()
    if quantized:
        quantize_(model)
    before = model(IDS)
    add_lora(model, LoRAConfig(r=2, alpha=4.0, target="q_proj"), name="small")
    add_lora(model, LoRAConfig(r=5, alpha=9.0, dora=True, rslora=True, exclude=("q_proj",)), name="large")
    randomize(model, "small", 1)
    randomize(model, "large", 2)
    return model, before


def test_each_adapter_is_what_it_is_alone() -> None:
    model, before = two_adapters()
    for name, options in (
        ("small", {"r": 2, "alpha": 4.0, "target": "q_proj"}),
        ("large", {"r": 5, "alpha": 9.0, "dora": True, "rslora": True, "exclude": ("q_proj",)}),
    ):
        alone = Model()
        quantize_(alone)
        add_lora(alone, LoRAConfig(**options), name=name)
        own = adapter_parameters(alone, name)
        assert own.keys() == adapter_parameters(model, name).keys()
        with torch.no_grad():
            for key, parameter in adapter_parameters(model, name).items():
                own[key].copy_(parameter)
        nybble.set_adapter(model, name)
        assert torch.equal(model(IDS), alone(IDS))
        assert not torch.equal(model(IDS), before)
    nybble.set_adapter(model, None)
    assert torch.equal(model(IDS), before)


def test_the_new_adapter_acts_and_the_others_stay_as_they_are() -> None:
    model, _ = two_adapters()
    small = {name: (p.clone(), p.requires_grad) for name, p in adapter_parameters(model, "small").items()}
    report = add_lora(model, r=3, name="third", target="lm_head")
    assert report.targets == ["lm_head"]
    assert report.trainable == 3 * (16 + 11)
    assert [(info.name, info.kinds, info.acting) for info in nybble.adapters(model)] == [
        ("small", ("lora",), False),
        ("large", ("lora",), False),
        ("third", ("lora",), True),
    ]
    for name, parameter in adapter_parameters(model, "small").items():
        assert torch.equal(parameter, small[name][0]) and parameter.requires_grad
    assert set(acting_parameters(model)) == {f"lm_head.adapters.third.lora_{x}" for x in "AB"}
    base = [p for name, p in model.named_parameters() if ".adapters." not in name]
    assert not any(p.requires_grad for p in base)


def test_a_step_trains_the_adapter_that_acts_and_no_other() -> None:
    model, _ = two_adapters()
    nybble.set_adapter(model, "small")
    loss = functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
    loss.backward()
    assert all(p.grad is not None for p in adapter_parameters(model, "small").values())
    assert all(p.grad is None for p in adapter_parameters(model, "large").values())


def test_use_adapter_is_for_the_time_of_a_block() -> None:
    model, before = two_adapters()
    nybble.set_adapter(model, "small")
    small = model(IDS)
    with pytest.raises(KeyError), nybble.use_adapter(model, None):
        assert torch.equal(model(IDS), before)
        raise KeyError
    assert torch.equal(model(IDS), small)
    with nybble.use_adapter(model, ["large", None]):
        assert torch.equal(model(IDS)[1], before[1])


def test_deleting_adapters_gives_the_model_back() -> None:
    model, before = two_adapters()
    nybble.set_adapter(model, "small")
    expected = model(IDS)
    nybble.delete_adapter(model, "large")
    assert torch.equal(model(IDS), expected)
    assert not isinstance(model.blocks[0].mlp["up_proj"], LoRALinear)
    nybble.delete_adapter(model, "small")
    assert torch.equal(model(IDS), before)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    with pytest.raises(ValueError, match="no adapter 'small'; it has none"):
        nybble.delete_adapter(model, "small")


def test_deleting_an_adapter_that_stands_around_itself() -> None:
    for order in ((0, 1), (1, 0)):
        model = Model()
        before = model(IDS)
        for step in order:
            if step:
                add_lora(model, r=2, target="down_proj", name="both")
            else:
                nybble.add_bottleneck(model, size=3, target="down_proj", name="both")
        nybble.delete_adapter(model, "both")
        assert type(model.blocks[0].mlp["down_proj"]) is nn.Linear
        assert torch.equal(model(IDS), before)
        assert model.state_dict().keys() == Model().state_dict().keys()


def test_copies_keep_their_adapters_and_choose_by_themselves() -> None:
    model, before = two_adapters()
    nybble.set_adapter(model, "small")
    small = model(IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS), small)
        nybble.set_adapter(other, None)
        assert torch.equal(other(IDS), before)
        assert torch.equal(model(IDS), small)


def test_a_state_dict_holds_all_adapters() -> None:
    model, _ = two_adapters()
    other, _ = two_adapters()
    randomize(other, "small", 7)
    other.load_state_dict(model.state_dict())
    for name in ("small", "large"):
        nybble.set_adapter(model, name)
        nybble.set_adapter(other, name)
        assert torch.equal(model(IDS), other(IDS))


def test_a_name_is_wanted_where_several_could_be_meant() -> None:
    layer = LoRALinear.from_base(linear(), r=2, alpha=4.0, name="one")
    layer.add("two", r=3, alpha=4.0)
    assert layer.r == 2  # the one that acts
    nybble.set_adapter(layer, None)
    with pytest.raises(ValueError, match="this layer has 'one', 'two'; give one's name"):
        _ = layer.lora_A
    assert layer.adapter("two").r == 3
    with pytest.raises(ValueError, match="this layer has 'one', 'two'; not 'three'"):
        layer.adapter("three")
    with pytest.raises(ValueError, match="adapter 'one' is there already"):
        layer.add("one", r=2, alpha=4.0)
    with pytest.raises(ValueError, match="no adapter 'three'; it has 'one', 'two'"):
        nybble.set_adapter(layer, "three")
    with pytest.raises(ValueError, match="which is empty"):
        nybble.set_adapter(layer, [])
    nybble.delete_adapter(layer, "one")
    assert layer.r == 3  # the only one


@pytest.mark.parametrize("name", ["", "a.b", "a b", "keys", "items", 3, None, "-a"])
def test_names_that_cannot_be(name: Any) -> None:
    model = Model()
    with pytest.raises(ValueError, match="adapter name is"):
        add_lora(model, name=name)
    assert not nybble.adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_after_an_error_nothing_has_changed() -> None:
    model, _ = two_adapters()
    before = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    for options, error in (
        ({"target": "nothing"}, PatternError),
        ({"target": ("q_proj", "embedding"), "dora": True}, ValueError),
        ({"modules_to_save": "nothing"}, PatternError),
        ({"modules_to_save": "q_proj"}, TypeError),  # quantized
    ):
        with pytest.raises(error):
            add_lora(model, name="third", **options)
    assert [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)] == before
    assert [info.name for info in nybble.adapters(model) if info.acting] == ["large"]


def test_quantizing_afterwards_leaves_adapted_layers_alone_and_names_the_others_as_they_were() -> None:
    model = Model()
    add_lora(model, r=2, target="q_proj")
    report = quantize_(model)
    assert report.quantized == [name for name in INNER if "q_proj" not in name]


def test_residual_starts_are_for_one_adapter() -> None:
    model = nn.Sequential(linear(64, 64))
    weights = {"0.weight": model[0].weight.detach().clone()}
    quantize_(model)
    add_lora(model, r=4, name="plain")
    add_lora(model, r=4, name="start")
    rows = init_from_residual(model, weights, name="start")
    assert rows["0"].after < rows["0"].before
    assert bool(model[0].adapters["start"].lora_B.any()) and not bool(model[0].adapters["plain"].lora_B.any())
    with pytest.raises(ValueError, match="pissa would change the base, which adapter 'plain' is for too"):
        init_from_residual(model, weights, "pissa", name="start")
    nybble.delete_adapter(model, "plain")
    init_from_residual(model, weights, "pissa")


# ---- embeddings and heads --------------------------------------------------------------------------------------------


def embedded(model: nn.Module, layer: LoRAEmbedding, name: str, ids: Tensor) -> Tensor:
    """The embedding of ids by its definition."""
    adapter = layer.adapters[name]
    return functional.embedding(ids, layer.base.weight + adapter.delta_weight().T)


def test_embeddings_are_targets_by_name() -> None:
    model = Model()
    before = model(IDS)
    report = add_lora(model, r=3, alpha=6.0, target=("embedding", "q_proj"), name="one")
    assert report.targets == ["embedding", "blocks.0.q_proj", "blocks.1.q_proj"]
    layer = model.embedding
    assert isinstance(layer, LoRAEmbedding)
    assert torch.equal(model(IDS), before)
    add_lora(model, r=2, alpha=6.0, rslora=True, target="embedding", name="two")
    randomize(model, "one", 1)
    randomize(model, "two", 2)
    for name in ("one", "two"):
        nybble.set_adapter(model, name)
        torch.testing.assert_close(layer(IDS), embedded(model, layer, name, IDS))
    nybble.set_adapter(model, ["two", "one"])
    y = layer(IDS)
    torch.testing.assert_close(y[0], embedded(model, layer, "two", IDS[0]))
    torch.testing.assert_close(y[1], embedded(model, layer, "one", IDS[1]))
    y.square().sum().backward()
    used = layer.adapters["one"].lora_A.grad.any(0)
    assert used.tolist() == [token in IDS[1] for token in range(11)]  # its own row's tokens, no others
    assert add_lora(Model(), r=2).targets == INNER  # all linear layers are no embeddings


class Scaled(nn.Embedding):
    """As Gemma's: the table's rows times a factor."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 4.0


def test_a_target_that_can_have_no_update_is_refused() -> None:
    model = Model()
    model.embedding = Scaled(11, 16)
    with pytest.raises(
        PatternError, match=r"'embedding' reaches only layers that cannot have an update: .*, a Scaled,"
    ):
        add_lora(model, r=2, target=("q_proj", "embedding"))
    assert not nybble.adapters(model)


def test_padding_is_not_trained() -> None:
    layer = LoRAEmbedding.from_base(nn.Embedding(5, 4, padding_idx=2), r=2, alpha=4.0)
    layer(torch.tensor([[0, 2]])).sum().backward()
    assert layer.adapters["default"].lora_A.grad.any(0).tolist() == [True, False, False, False, False]
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (5, 4, 2)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_head_has_an_update_of_its_own(quantized: bool) -> None:
    model = Model()
    if quantized:
        quantize_(model, nybble.QuantConfig(skip=()))
    before = model(IDS)
    add_lora(model, r=3, target="lm_head")
    assert torch.equal(model(IDS), before)
    randomize(model, "default", 1)
    hidden = torch.randn(2, 16)
    torch.testing.assert_close(
        model.lm_head(hidden), model.lm_head.base(hidden) + hidden @ model.lm_head.delta_weight().T
    )


def test_a_tied_head_stays_tied_to_the_table_and_gets_its_own_update() -> None:
    model = Model(tied=True)
    report = add_lora(model, r=3, target=("lm_head", "embedding"))
    assert sorted(report.notes) == [
        "embedding shares its weight with lm_head.weight",
        "lm_head shares its weight with embedding.weight",
    ]
    assert model.lm_head.weight is model.embedding.weight
    randomize(model, "default", 1)
    hidden = torch.randn(2, 16)
    table = model.embedding.base.weight
    torch.testing.assert_close(model.lm_head(hidden), hidden @ (table + model.lm_head.delta_weight()).T)
    torch.testing.assert_close(model.embedding(IDS), embedded(model, model.embedding, "default", IDS))


def test_the_layers_around_answer_as_their_base() -> None:
    base = quant_linear()
    layer = LoRALinear.from_base(base, r=2, alpha=2.0)
    assert (layer.weight is base.weight, layer.bias is base.bias) == (True, True)
    assert (layer.in_features, layer.out_features) == (base.in_features, base.out_features)


@pytest.mark.parametrize("base", [quant_linear, linear])
def test_dora_compiles_as_one_graph_before_it_has_ever_run(base: Any) -> None:
    layer = LoRALinear.from_base(base(), r=3, alpha=6.0, dora=True)
    with torch.no_grad():
        layer.lora_B.normal_()
    torch.compiler.reset()
    fresh = copy.deepcopy(layer)  # which has kept nothing
    x = torch.randn(4, 70)
    torch.testing.assert_close(torch.compile(fresh, fullgraph=True, backend="aot_eager")(x), layer(x))
    torch.compiler.reset()
