"""QuantLinear: how it is made, that its bytes outlive whatever happens to it, and what its state dict takes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn.layers import CONFIGS, DTYPES, assert_same_state, linear, quant_linear
from torch import Tensor, nn

from nybble import QuantConfig, QuantLinear, QuantTensor
from nybble.errors import LayoutError, NonFiniteError, UnsupportedDtypeError


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> QuantConfig:
    return CONFIGS[request.param]


def cloned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


# ---- making ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_linear_holds_what_the_codec_gives(config: QuantConfig, dtype: torch.dtype) -> None:
    source = linear(dtype=dtype)
    layer = QuantLinear.from_linear(source, config)
    expected = QuantTensor.quantize(source.weight, config)
    assert_same_state({k: v for k, v in layer.state_dict().items() if k != "bias"}, expected.state())
    assert layer.bias is source.bias
    assert (layer.in_features, layer.out_features, layer.dtype) == (70, 10, dtype)
    assert torch.equal(layer.dequantize(), expected.dequantize())
    assert layer.dequantize().dtype == dtype
    assert layer.dequantize(torch.float32).dtype == torch.float32


def test_everything_but_the_bias_is_frozen(config: QuantConfig) -> None:
    layer = quant_linear(config)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    y = layer(torch.randn(3, 70, requires_grad=True))
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((10,), 3.0))


def test_from_quant_tensor_copies_nothing(config: QuantConfig) -> None:
    tensor = QuantTensor.quantize(linear().weight, config)
    layer = QuantLinear.from_quant_tensor(tensor)
    assert layer.weight.data_ptr() == tensor.packed.data_ptr()
    assert layer.absmax.data_ptr() == tensor.absmax.data_ptr()
    view = layer.quant_tensor()
    assert view.packed.data_ptr() == tensor.packed.data_ptr()
    assert view.absmax.data_ptr() == tensor.absmax.data_ptr()
    assert view.format == tensor.format
    # The configuration is told by the tensor.
    assert layer.config.format_name == tensor.format
    assert layer.config.is_4bit == (tensor.codebook is not None)


def test_the_mode_is_kept() -> None:
    assert not QuantLinear.from_linear(linear().eval()).training
    assert QuantLinear.from_linear(linear().train()).training


def test_what_cannot_be_a_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="linear is a Conv1d"):
        QuantLinear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(UnsupportedDtypeError, match=r"layer\.weight has dtype torch\.float64"):
        QuantLinear.from_linear(nn.Linear(2, 2, dtype=torch.float64), name="layer.weight")
    broken = linear()
    broken.weight.data[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.q\.weight"):
        QuantLinear.from_linear(broken, name="model.q.weight")
    with pytest.raises(LayoutError, match=r"shape \[2, 3, 4\]"):
        QuantLinear.from_quant_tensor(QuantTensor.quantize(torch.randn(2, 3, 4)))
    tensor = QuantTensor.quantize(torch.randn(4, 6))
    with pytest.raises(LayoutError, match=r"bias has shape \[6\]; it must be \[4\]"):
        QuantLinear.from_quant_tensor(tensor, torch.randn(6))
    with pytest.raises(LayoutError, match=r"weight has shape \[4, 6\]; this layer needs \[6, 4\]"):
        QuantLinear(4, 6).load_quant_tensor(tensor)


def test_a_layer_without_a_weight_says_so() -> None:
    for use in (lambda m: m(torch.randn(1, 4)), lambda m: m.dequantize(), lambda m: m.quant_tensor()):
        with pytest.raises(LayoutError, match="no weight yet"):
            use(QuantLinear(4, 6))
    assert QuantLinear(4, 6).state_dict() == {}


def test_repr_names_the_format() -> None:
    text = repr(quant_linear())
    assert "in_features=70, out_features=10, bias=True, format=nf4, block_size=64, double_quant" in text
    assert "format=int8" in repr(quant_linear(CONFIGS["int8"]))


# ---- computing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [96, 144, 400, 4304])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_widths_that_are_no_multiple_of_the_block(isa: str, k: int, train: bool) -> None:
    # bitsandbytes decodes these wrongly on CPU, and crashes in eval where out_features is no multiple of 32.
    layer = quant_linear(n=9, k=k).train(train)
    for m in (1, 12):
        x = torch.randn(m, k)
        exact = x.double() @ layer.dequantize().double().t() + layer.bias.double()
        size = x.double().abs() @ layer.dequantize().double().abs().t() + layer.bias.double().abs()
        # gamma_(k + 4) for the fp32 sum of k products and a bias; 1.01 for 1 / (1 - n u).
        assert bool(((layer(x).double() - exact).abs() <= 1.01 * (k + 4) * 2.0**-24 * size).all())


def test_an_fp32_input_is_computed_in_fp32(isa: str) -> None:
    # bitsandbytes rounds it to bf16. Powers of two down to 2^-20 below the first: bf16 has 8 bits.
    layer = quant_linear(QuantConfig(double_quant=False), n=4, k=64, bias=False)
    step = torch.zeros(1, 64)
    step[0, 0] = 2.0**-20
    for m in (1, 12):
        x = torch.ones(m, 64)
        x[:, 0] += step[0, 0]
        exact = x.double() @ layer.dequantize().double().t()
        size = layer.dequantize().double().abs().sum(1)
        assert bool(((layer(x).double() - exact).abs() <= 1.01 * 68 * 2.0**-24 * 1.001 * size).all())


def test_zero_stays_zero(config: QuantConfig) -> None:
    if config.format_name == "custom":
        config = QuantConfig(format=tuple(i - 7.0 for i in range(16)), double_quant=False)  # a codebook with a zero
    layer = quant_linear(config, bias=False)
    assert not bool(layer(torch.zeros(3, 70)).any())
    source = linear()
    source.weight.data.zero_()
    zero = QuantLinear.from_linear(source, config)
    assert not bool(zero.dequantize().any())
    assert torch.equal(zero(torch.randn(3, 70)), source.bias.expand(3, 10))


def test_the_input_gradient_survives_switching_between_train_and_eval(config: QuantConfig) -> None:
    # bitsandbytes silently loses it after train -> eval -> train.
    layer, gradients = quant_linear(config), []
    for train in (True, False, True):
        layer.train(train)
        torch.manual_seed(3)
        x = torch.randn(12, 70, requires_grad=True)
        layer(x).square().sum().backward()
        gradients.append(x.grad)
    assert bool(gradients[0].any())
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


# ---- the bytes outlive everything ------------------------------------------------------------------------------------


def forward_backward(layer: QuantLinear) -> QuantLinear:
    for m in (1, 12):
        layer(torch.randn(m, 70, dtype=layer.bias.dtype, requires_grad=True)).float().sum().backward()
    return layer


def through_file(layer: QuantLinear) -> QuantLinear:
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other = QuantLinear.empty(70, 10, True, layer.config, layer.dtype)
    other.load_state_dict(torch.load(stream, weights_only=True))
    return other


def eval_then_train(layer: QuantLinear) -> QuantLinear:
    with torch.no_grad():
        layer.eval()(torch.randn(1, 70))
    return forward_backward(layer.train())


EVENTS: dict[str, Callable[[QuantLinear], QuantLinear]] = {
    "forward and backward": forward_backward,
    "eval and train": eval_then_train,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": through_file,
    "to cpu": lambda layer: layer.to("cpu"),
    "requires_grad_(False)": lambda layer: layer.requires_grad_(False),
    "share_memory": lambda layer: layer.share_memory(),
    "to float": lambda layer: layer.float(),
    "double": lambda layer: layer.double().float(),
    "zero_grad": lambda layer: (layer.zero_grad(), layer)[1],
}


@pytest.mark.parametrize("event", list(EVENTS))
def test_state_dict_is_bit_exact_after(config: QuantConfig, event: str) -> None:
    layer = quant_linear(config)
    before = cloned(layer.state_dict())
    assert_same_state(EVENTS[event](layer).state_dict(), before)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "half": lambda layer: layer.half(),
    "half then float": lambda layer: forward_backward(layer.half()).float(),
}


@pytest.mark.parametrize("cast", list(CASTS))
def test_casting_changes_the_bias_and_nothing_else(config: QuantConfig, cast: str) -> None:
    layer = quant_linear(config)
    before = cloned(layer.state_dict())
    weight = layer.dequantize()
    layer = CASTS[cast](layer)
    after = layer.state_dict()
    assert after.pop("bias").dtype == (torch.float32 if "float" in cast.split() else layer.bias.dtype)
    before.pop("bias")
    assert_same_state(after, before)
    assert torch.equal(layer.dequantize(), weight)


def test_a_copy_computes_the_same(config: QuantConfig) -> None:
    layer, x = quant_linear(config), torch.randn(12, 70)
    for event in ("deepcopy", "pickle", "torch.save"):
        assert torch.equal(EVENTS[event](layer)(x), layer(x))


def test_a_pickled_module_keeps_its_configuration(config: QuantConfig) -> None:
    other = pickle.loads(pickle.dumps(quant_linear(config)))
    assert other.config == config


# ---- load_state_dict -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_empty_layer_takes_a_state_dict(config: QuantConfig, assign: bool, device: str) -> None:
    source, x = quant_linear(config), torch.randn(12, 70)
    layer = QuantLinear.empty(70, 10, True, config, torch.float32, device=device)
    state = cloned(source.state_dict())
    assert not layer.load_state_dict(state, assign=assign).missing_keys
    assert layer.weight.device.type == "cpu"
    assert torch.equal(layer(x), source(x))
    assert_same_state(layer.state_dict(), source.state_dict())
    shares = layer.weight.data_ptr() == state["weight"].data_ptr()
    assert shares == assign
    assert (layer.bias.data_ptr() == state["bias"].data_ptr()) == assign


def test_loading_copies_so_that_the_state_dict_may_change(config: QuantConfig) -> None:
    source = quant_linear(config)
    layer = QuantLinear.empty(70, 10, True, config, torch.float32)
    state = cloned(source.state_dict())
    layer.load_state_dict(state)
    for value in state.values():
        value.zero_()
    assert_same_state(layer.state_dict(), source.state_dict())


@pytest.mark.parametrize("other", list(CONFIGS))
def test_a_layer_adopts_the_format_of_what_it_loads(config: QuantConfig, other: str) -> None:
    source, x = quant_linear(CONFIGS[other], seed=1), torch.randn(12, 70)
    layer = quant_linear(config)
    layer.load_state_dict(cloned(source.state_dict()))
    assert torch.equal(layer(x), source(x))
    assert_same_state(layer.state_dict(), source.state_dict())
    assert layer.config.format_name == source.config.format_name
    assert layer.config.block_size == source.config.block_size or not layer.config.is_4bit
    assert layer.config.double_quant == source.config.double_quant


def test_the_state_dict_of_a_model_has_bitsandbytes_keys() -> None:
    model = nn.Sequential(quant_linear(), quant_linear(CONFIGS["int8"], n=3, k=10, bias=False))
    names = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
    keys = {*(f"0.weight{name}" for name in names), "0.bias", "1.weight", "1.SCB", "1.weight_format"}
    assert set(model.state_dict()) == keys


def load(changes: dict[str, Any], **options: Any) -> Any:
    """Loads a good state dict of `0.` with changes (None: key removed) into a fresh model."""
    state = cloned(nn.Sequential(quant_linear(seed=1)).state_dict())
    for key, value in changes.items():
        state.pop(key, None)
        if value is not None:
            state[key] = value
    return nn.Sequential(quant_linear()).load_state_dict(state, **options)


def test_missing_and_unexpected_keys_are_reported() -> None:
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.weight"'):
        load({"0.weight": None})
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.bias"'):
        load({"0.bias": None})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\.weight\.extra"'):
        load({"0.weight.extra": torch.zeros(1)})
    result = load({"0.bias": None, "0.more": torch.zeros(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["0.bias"], ["0.more"])
    state = quant_linear().state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias"'):
        quant_linear(bias=False).load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"0.weight": torch.zeros(349, 1, dtype=torch.uint8)}, r"0\.weight has shape \[349, 1\]"),
        ({"0.weight": torch.zeros(350, 1, dtype=torch.int16)}, r"0\.weight has dtype torch\.int16"),
        ({"0.weight.absmax": None}, r"0\.weight: missing 0\.weight\.absmax"),
        ({"0.weight.absmax": torch.zeros(3, dtype=torch.uint8)}, r"0\.weight\.absmax has shape \[3\]"),
        ({"0.weight.quant_map": torch.zeros(15)}, r"0\.weight\.quant_map has shape \[15\]"),
        ({"0.weight.nested_quant_map": None}, r"missing 0\.weight\.nested_quant_map"),
        ({"0.weight.quant_state.bitsandbytes__nf4": None}, "no quant_state key"),
        ({"0.bias": torch.zeros(11)}, r"0\.bias has shape \[11\]; it must be \[10\]"),
    ],
)
def test_a_state_that_does_not_fit_is_reported_by_the_tensors_name(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        load(changes)


def test_the_state_of_a_layer_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"weight has shape \[10, 64\]; this layer needs \[10, 70\]"):
        quant_linear().load_state_dict(quant_linear(k=64).state_dict())


def test_a_refused_state_leaves_the_layer_as_it_was(config: QuantConfig) -> None:
    layer = quant_linear(config)
    before = cloned(layer.state_dict())
    state = cloned(quant_linear(seed=1).state_dict())
    state["weight.absmax"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="absmax"):
        layer.load_state_dict(state)
    assert_same_state(layer.state_dict(), before)


def test_the_bias_keeps_its_dtype_and_identity_on_loading() -> None:
    layer = quant_linear().to(torch.bfloat16)
    bias = layer.bias
    layer.load_state_dict(quant_linear(seed=1).state_dict())
    assert layer.bias is bias
    assert layer.bias.dtype == torch.bfloat16


def test_meta_layers_compute_shapes(config: QuantConfig) -> None:
    layer = QuantLinear.empty(70, 10, True, config, torch.bfloat16, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    y = layer(torch.empty(2, 3, 70, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype, y.is_meta) == ((2, 3, 10), torch.bfloat16, True)
