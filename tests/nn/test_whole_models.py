"""quantize_ and add_lora over whole models: what is replaced, what is left alone and why, ties, and errors."""

from __future__ import annotations

import copy

import pytest
import torch
from nn.layers import CONFIGS
from torch import Tensor, nn
from torch.nn import functional

from nybble import LoRAConfig, LoRALinear, QuantConfig, QuantLinear, add_lora, quantize_
from nybble.errors import NonFiniteError, PatternError, UnsupportedDtypeError
from nybble.nn import count_parameters


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, 2 * width), "down_proj": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](self.q_proj(x))))


class Model(nn.Module):
    """A language model's outline: embedding, two blocks, head; `tied` as transformers ties them."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


INNER = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("q_proj", "mlp.up_proj", "mlp.down_proj")]
IDS = torch.arange(10).reshape(2, 5)


def kinds(model: nn.Module) -> dict[str, str]:
    names = (QuantLinear, nn.Linear, LoRALinear)
    return {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, names)}


def snapshot(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]


# ---- quantize_ -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", list(CONFIGS))
def test_every_linear_layer_but_the_head_is_replaced(config: str) -> None:
    model, original = Model().eval(), Model().eval()
    report = quantize_(model, CONFIGS[config])
    assert report.quantized == INNER
    assert report.skipped == {"lm_head": "the configuration skips it"}
    assert report.parameters == 2 * (16 * 16 + 2 * 16 * 32)
    assert report.bytes_before == 4 * report.parameters
    layers = [model.get_submodule(name) for name in INNER]
    assert report.bytes_after == sum(layer.quant_tensor().nbytes for layer in layers)
    assert report.bits_per_weight == 8 * report.bytes_after / report.parameters
    assert all(isinstance(layer, QuantLinear) and not layer.training for layer in layers)
    # The model computes with the dequantized weights.
    for name, layer in zip(INNER, layers, strict=True):
        original.get_submodule(name).weight.data = layer.dequantize()
    torch.testing.assert_close(model(IDS), original(IDS))
    assert "quantized 6 layers" in str(report)
    assert "kept lm_head: the configuration skips it" in str(report)


def test_skip_patterns() -> None:
    report = quantize_(Model(), skip=["q_proj", "blocks.1.*"])
    assert report.quantized == ["blocks.0.mlp.up_proj", "blocks.0.mlp.down_proj"]
    assert report.skipped["blocks.0.q_proj"] == "matches skip pattern 'q_proj'"
    assert report.skipped["blocks.1.mlp.up_proj"] == "matches skip pattern 'blocks.1.*'"
    assert quantize_(Model(), skip="q_proj").quantized == [name for name in INNER if "q_proj" not in name]
    assert "lm_head" in quantize_(Model(), QuantConfig(skip=())).quantized


def test_overrides() -> None:
    config = QuantConfig(
        overrides={"q_proj": "int8", "*.up_proj": {"format": "fp4", "block_size": 32}, "blocks.1.*": None}
    )
    model = Model()
    report = quantize_(model, config)
    assert model.blocks[0].q_proj.config.format == "int8"
    assert model.blocks[1].q_proj.config.format == "int8"  # the first pattern that matches wins
    assert model.blocks[0].mlp["up_proj"].config.format == "fp4"
    assert model.blocks[0].mlp["up_proj"].config.block_size == 32
    assert model.blocks[0].mlp["down_proj"].config.format == "nf4"
    assert isinstance(model.blocks[1].mlp["down_proj"], nn.Linear)
    assert report.skipped["blocks.1.mlp.down_proj"] == "the configuration skips it"


def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing() -> None:
    model = Model()
    before = snapshot(model)
    with pytest.raises(PatternError, match=r"skip: the pattern 'k_proj' matches none of.*blocks\.0\.q_proj"):
        quantize_(model, skip=["q_proj", "k_proj"])
    with pytest.raises(PatternError, match=r"config\.overrides: the pattern 'k_proj' matches none"):
        quantize_(model, QuantConfig(overrides={"k_proj": "int8"}))
    with pytest.raises(PatternError, match="there are none"):
        quantize_(nn.Sequential(nn.ReLU()), skip="q_proj")
    assert snapshot(model) == before


def test_a_model_without_linear_layers_is_left_alone() -> None:
    report = quantize_(nn.Sequential(nn.ReLU(), nn.Conv1d(1, 1, 1)))
    assert (report.quantized, report.skipped, report.bits_per_weight) == ([], {}, 0.0)


def test_a_quantized_model_is_left_alone() -> None:
    model = Model()
    quantize_(model)
    before = snapshot(model)
    assert quantize_(model).quantized == []
    assert snapshot(model) == before


def test_a_bare_linear_cannot_be_replaced_in_place() -> None:
    with pytest.raises(TypeError, match=r"module is an nn\.Linear.*QuantLinear\.from_linear"):
        quantize_(nn.Linear(4, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_changed(value: float) -> None:
    model = Model()
    model.blocks[1].mlp["down_proj"].weight.data[3, 4] = value
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match=r"^blocks\.1\.mlp\.down_proj\.weight"):
        quantize_(model)
    assert snapshot(model) == before
    assert all(
        torch.equal(a, b) or value != value for a, b in zip(model.state_dict().values(), state.values(), strict=True)
    )


def test_a_weight_that_int8_cannot_hold_is_named_and_nothing_is_changed() -> None:
    model = Model()
    model.blocks[1].q_proj.weight.data[0, 0] = 7e4  # above fp16's largest
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=r"^blocks\.1\.q_proj\.weight"):
        quantize_(model, CONFIGS["int8"])
    assert snapshot(model) == before
    assert quantize_(model).quantized == INNER


def test_a_weight_of_another_dtype_is_named_and_nothing_is_changed() -> None:
    model = Model()
    model.blocks[1].q_proj.double()
    before = snapshot(model)
    with pytest.raises(UnsupportedDtypeError, match=r"blocks\.1\.q_proj\.weight has dtype torch\.float64"):
        quantize_(model)
    assert snapshot(model) == before


def test_a_head_tied_to_the_embedding_stays(isa: str) -> None:
    model = Model(tied=True)
    report = quantize_(model, QuantConfig(skip=()))
    assert report.quantized == INNER
    assert report.skipped["lm_head"] == "its weight is tied to embedding.weight"
    assert model.lm_head.weight is model.embedding.weight
    model(IDS)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_layers_that_share_a_weight_share_the_packed_one() -> None:
    model = Pair()
    biases = model.first.bias, model.second.bias
    report = quantize_(model)
    assert report.quantized == ["first", "second"]
    assert report.tied == {"second": "first"}
    assert "second shares the packed weight of first" in str(report)
    assert report.parameters == 64
    for candidate in (model, copy.deepcopy(model)):
        assert candidate.first is not candidate.second
        assert candidate.first.weight is candidate.second.weight
        assert candidate.first.absmax is candidate.second.absmax
    assert (model.first.bias, model.second.bias) == biases
    assert count_parameters(model) == 64 + 2 * 8


def test_layers_that_share_a_weight_are_quantized_alike_or_not_at_all() -> None:
    model = Pair()
    report = quantize_(model, skip="second")
    assert report.quantized == []
    assert report.skipped["first"] == "its weight is tied to second, which stays as it is"
    assert model.first.weight is model.second.weight
    report = quantize_(model, QuantConfig(overrides={"second": "int8"}))
    assert report.quantized == []
    assert "another configuration" in report.skipped["first"]


def test_one_module_under_two_names_stays_one_module() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = quantize_(model)
    assert report.quantized == ["a", "b.0"]
    assert report.parameters == 64
    assert isinstance(model["a"], QuantLinear)
    assert model["a"] is model["b"][0]


def test_subclasses_of_linear_stay_and_attention_works() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True), "out": nn.Linear(16, 4)})
    x = torch.randn(2, 3, 16)
    before = model["attention"](x, x, x)[0]
    report = quantize_(model)
    assert report.quantized == ["out"]
    assert "subclass of nn.Linear" in report.skipped["attention.out_proj"]
    assert torch.equal(model["attention"](x, x, x)[0], before)


@pytest.mark.parametrize("train", [False, True])
def test_torchs_transformer_layers_still_work(train: bool) -> None:
    # In eval the encoder layer has a fast path that reads the weights of its linear layers past their forward.
    torch.manual_seed(0)
    for layer in (
        nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True),
        nn.TransformerDecoderLayer(16, 2, 32, 0.0),
    ):
        model = nn.ModuleList([layer, nn.Linear(16, 4)]).train(train)
        report = quantize_(model)
        assert "1" in report.quantized
        x = torch.randn(2, 3, 16)
        with torch.no_grad():
            y = layer(x) if isinstance(layer, nn.TransformerEncoderLayer) else layer(x, x)
        assert y.shape == x.shape


def test_weights_on_meta_are_left_alone() -> None:
    with torch.device("meta"):
        model = Model()
    report = quantize_(model)
    assert report.quantized == []
    assert set(report.skipped) == {*INNER, "lm_head"}
    assert "meta device" in report.skipped[INNER[0]]


def test_the_base_of_a_lora_layer_is_left_alone() -> None:
    model = Model()
    add_lora(model, target="q_proj")
    report = quantize_(model)
    assert all("q_proj" not in name for name in report.quantized)
    assert isinstance(model.blocks[0].q_proj.base, nn.Linear)


# ---- add_lora --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_all_linear_layers_but_the_head(quantized: bool) -> None:
    model = Model()
    if quantized:
        quantize_(model)
    expected = model(IDS)
    report = add_lora(model, LoRAConfig(r=2, alpha=4.0))
    assert report.targets == INNER
    assert torch.equal(model(IDS), expected)
    assert all(isinstance(model.get_submodule(name), LoRALinear) for name in INNER)
    assert isinstance(model.lm_head, nn.Linear)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(trainable) == sorted(f"{name}.adapters.default.lora_{x}" for name in INNER for x in "AB")
    assert report.trainable == 2 * (2 * (16 + 16) + 2 * 2 * (16 + 32))
    # Embedding, head, norm, blocks with their biases, and the adapter.
    dense = 2 * 11 * 16 + 2 * 16 + 2 * (16 * 16 + 2 * 16 * 32 + 16 + 32)
    assert report.total == dense + report.trainable
    assert f"LoRA on 6 layers: {report.trainable:,} of {report.total:,} parameters train" in str(report)


def test_targets_by_pattern() -> None:
    model = Model()
    report = add_lora(model, r=2, target=("q_proj", "blocks.1.mlp.*"), exclude=("down_proj",))
    assert report.targets == ["blocks.0.q_proj", "blocks.1.q_proj", "blocks.1.mlp.up_proj"]
    assert kinds(model)["blocks.0.q_proj"] == "LoRALinear"
    assert add_lora(Model(), r=2, target="up_proj").targets == ["blocks.0.mlp.up_proj", "blocks.1.mlp.up_proj"]
    assert add_lora(Model(), r=2, target="lm_head").targets == ["lm_head"]
    assert "lm_head" in add_lora(Model(), r=2, exclude=()).targets
    assert add_lora(Model(), r=2, target=["q_proj"]).targets == ["blocks.0.q_proj", "blocks.1.q_proj"]


def test_the_fields_of_the_configuration_reach_the_layers() -> None:
    model = Model()
    add_lora(model, r=3, alpha=5.0, dropout=0.2, rslora=True, init="gaussian", dtype=torch.bfloat16, target="q_proj")
    layer = model.blocks[0].q_proj
    assert (layer.r, layer.alpha, layer.dropout, layer.rslora, layer.init) == (3, 5.0, 0.2, True, "gaussian")
    assert layer.lora_A.dtype == torch.bfloat16


def test_bad_targets_are_errors_and_change_nothing() -> None:
    model = Model()
    before = snapshot(model)
    with pytest.raises(PatternError, match=r"target: the pattern 'k_proj' matches none of.*q_proj"):
        add_lora(model, target=("q_proj", "k_proj"))
    with pytest.raises(PatternError, match="leaves no linear layer"):
        add_lora(model, target="q_proj", exclude="q_proj")
    with pytest.raises(PatternError, match="there are none"):
        add_lora(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="target is empty"):
        add_lora(model, target=())
    with pytest.raises(ValueError, match="r is 0"):
        add_lora(model, r=0)
    with pytest.raises(TypeError, match="got r too"):
        add_lora(model, LoRAConfig(), r=2)
    with pytest.raises(TypeError, match="model is a Linear"):
        add_lora(nn.Linear(4, 4))
    assert snapshot(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_name_that_is_taken_is_refused() -> None:
    model = Model()
    add_lora(model, target="q_proj")
    with pytest.raises(ValueError, match=r"adapter 'default' already \(blocks\.0\.q_proj and 1 more\)"):
        add_lora(model, target="up_proj")
    with pytest.raises(ValueError, match=r"adapter 'default' already \(the model itself"):
        add_lora(LoRALinear.from_base(nn.Linear(4, 4), 2, 4.0))
    with pytest.raises(ValueError, match=r"adapter name is 'a\.b'"):
        add_lora(model, target="up_proj", name="a.b")


def test_a_tied_weight_is_noted() -> None:
    model = Model(tied=True)
    report = add_lora(model, r=2, exclude=())
    assert report.notes == ["lm_head shares its weight with embedding.weight"]
    assert report.notes[0] in str(report)
    assert model.lm_head.base.weight is model.embedding.weight
    assert not model.embedding.weight.requires_grad


def test_one_module_under_two_names_gets_one_adapter() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = add_lora(model, r=2)
    assert report.targets == ["a", "b.0"]
    assert model["a"] is model["b"][0]
    assert report.trainable == 2 * (8 + 8)


def test_subclasses_of_linear_get_no_adapter() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "out": nn.Linear(16, 4)})
    assert add_lora(model, r=2).targets == ["out"]
    with pytest.raises(PatternError, match="leaves no linear layer"):
        add_lora(nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)}), r=2)


@pytest.mark.parametrize("config", list(CONFIGS))
def test_a_step_of_training_lowers_the_loss_and_leaves_the_base(config: str) -> None:
    model = Model()
    quantize_(model, CONFIGS[config])
    add_lora(model, r=4, alpha=8.0)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = functional.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert p.requires_grad or torch.equal(p, frozen[name])
