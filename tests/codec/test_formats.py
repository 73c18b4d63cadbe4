"""Codebooks, block sizes, name patterns and `QuantConfig`."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.formats import (
    BLOCK_SIZES,
    DYNAMIC_SIGNED,
    DYNAMIC_UNSIGNED,
    FP4,
    INT4,
    NF4,
    QuantConfig,
    codebook,
    dynamic_map,
    match_module,
)


@pytest.mark.parametrize(("name", "codes"), [("nf4", NF4), ("fp4", FP4), ("int4", INT4)])
def test_named_codebooks_have_16_codes_with_a_zero_and_a_one(name, codes):
    tensor = codebook(name)
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == [torch.tensor(c).item() for c in codes]
    assert 0.0 in tensor
    assert 1.0 in tensor


def test_fp4_is_in_bit_order_with_two_positive_zeros():
    twelfths = [round(12 * code, 4) for code in FP4]
    assert twelfths == [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]
    assert not torch.signbit(codebook("fp4"))[[0, 8]].any()


@pytest.mark.parametrize(("values", "signed"), [(DYNAMIC_SIGNED, True), (DYNAMIC_UNSIGNED, False)])
def test_dynamic_maps_follow_their_definition(values, signed):
    expected = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float64)
        magnitudes = 10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2
        expected += magnitudes.tolist() + ((-magnitudes).tolist() if signed else [])
    tensor = dynamic_map(signed)
    assert tensor.tolist() == list(values)
    assert len(values) == 256
    # The constants are the recorded ones, up to 2 ulp from the formula in exact arithmetic.
    torch.testing.assert_close(
        tensor.double(), torch.tensor(sorted(expected), dtype=torch.float64), rtol=2**-22, atol=0
    )


def test_named_codebooks_cannot_be_changed_by_a_caller():
    codebook("nf4").zero_()
    dynamic_map().zero_()
    assert codebook("nf4")[0] == -1
    assert dynamic_map()[255] == 1


def test_tables_are_on_the_cpu_under_a_meta_device():
    with torch.device("meta"):
        assert codebook("nf4").device.type == "cpu"
        assert codebook(INT4).device.type == "cpu"
        assert dynamic_map().device.type == "cpu"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (range(15), "15 numbers"),
        (range(17), "17 numbers"),
        ([], "0 numbers"),
        ([0.0] * 16, "ascending"),
        ([*range(15), 13], "entry 14 is 14.0 and entry 15 is 13.0"),
        ([*range(15), float("nan")], "finite"),
        ([*range(15), float("inf")], "finite"),
        ([*range(15), 1e39], "finite"),
        ([1 + i * 1e-9 for i in range(16)], "ascending in fp32"),
        ([*range(15), "x"], "16 numbers"),
        (FP4, "ascending"),
        (torch.zeros(4, 4), "16 numbers"),
        (7, "16 numbers"),
    ],
)
def test_codebooks_that_are_not_16_sorted_finite_numbers(numbers, message):
    with pytest.raises(ValueError, match=message):
        codebook(numbers)
    with pytest.raises(ValueError, match=message):
        QuantConfig(format=numbers)


def test_unknown_formats_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'nf3'.*nf4, fp4, int4, or 16 numbers"):
        codebook("nf3")
    with pytest.raises(ValueError, match=r"'nf3'.*nf4, fp4, int4, int8, learned, or 16 numbers"):
        QuantConfig(format="nf3")


@pytest.mark.parametrize("block_size", [0, 16, 33, 96, 8192, -64, 64.0, "64", None, True])
def test_block_sizes_that_are_not_allowed_list_the_allowed_ones(block_size):
    with pytest.raises(ValueError, match=r"block_size is .*32, 64, 128, 256, 512, 1024, 2048, 4096"):
        QuantConfig(block_size=block_size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"search": "gptq"}, "search is 'gptq'; allowed are absmax, mse"),
        ({"search": "mse", "format": "int8"}, "search is 'mse'"),
        ({"double_quant": 1}, "double_quant is 1"),
        ({"compute": torch.bfloat16}, "compute is torch.bfloat16; allowed are None .* and 'int8'"),
        ({"compute": "int4"}, "compute is 'int4'; allowed are None"),
        ({"overrides": {"a": {"compute": 8}}}, r"overrides\['a'\]: compute is 8"),
        ({"skip": ("",)}, "skip"),
        ({"skip": (3,)}, "skip"),
        ({"overrides": ["lm_head"]}, "overrides must map"),
        ({"overrides": {"a": "nf9"}}, r"overrides\['a'\]: format is 'nf9'"),
        ({"overrides": {"a": {"block": 64}}}, r"overrides\['a'\] has \['block'\]; allowed are format, block_size"),
        ({"overrides": {"a": {"block_size": 7}}}, r"overrides\['a'\]: block_size is 7"),
        ({"overrides": {"": None}}, "overrides has the key ''"),
    ],
)
def test_other_fields_that_are_not_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantConfig(**fields)


@pytest.mark.parametrize(
    ("name", "pattern", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("model.layers.0.mlp.down_proj", "down_proj", True),
        ("model.layers.0.mlp.down_proj", "mlp.down_proj", True),
        ("model.layers.0.mlp.down_proj", "mlp", False),
        ("model.layers.0.mlp.down_proj", "*.mlp.*", True),
        ("model.layers.0.mlp.down_proj", "model.layers.[0-3].*", True),
        ("model.layers.10.mlp.down_proj", "model.layers.?.*", False),
        ("model.layers.0.mlp.down_proj", "own_proj", False),
        ("model.layers.0.mlp.down_proj", "Down_proj", False),
        ("model.layers.0.mlp.down_proj", "*", True),
        ("", "*", True),
    ],
)
def test_patterns_match_the_full_name_or_a_dotted_suffix(name, pattern, matches):
    assert match_module(name, pattern) is matches


def test_for_module_applies_the_first_override_then_skip():
    config = QuantConfig(
        search="mse",
        skip=("lm_head", "*.router"),
        overrides={"down_proj": "int8", "*.mlp.*": {"format": "fp4", "block_size": 128}, "layers.0.*": None},
    )
    assert config.for_module("lm_head") is None
    assert config.for_module("layers.1.router") is None
    assert config.for_module("layers.1.attn.q_proj") is config
    down = config.for_module("layers.1.mlp.down_proj")
    assert (down.format, down.search, down.is_4bit, down.codebook) == ("int8", "absmax", False, None)
    up = config.for_module("layers.0.mlp.up_proj")
    assert (up.format, up.block_size, up.search, up.double_quant) == ("fp4", 128, "mse", True)
    assert config.for_module("layers.0.attn.q_proj") is None
    assert QuantConfig(overrides={"lm_head": "int8"}).for_module("lm_head").format == "int8"


@pytest.mark.parametrize(
    ("fields", "bits"),
    [
        ({}, 4 + 8 / 64 + 32 / (64 * 256)),
        ({"double_quant": False}, 4.5),
        ({"block_size": 32, "double_quant": False}, 5.0),
        ({"block_size": 4096, "double_quant": False}, 4 + 32 / 4096),
        ({"format": "int8"}, 8.0),
    ],
)
def test_bits_per_weight(fields, bits):
    assert QuantConfig(**fields).bits_per_weight == bits


configs = st.builds(
    QuantConfig,
    format=st.sampled_from(("nf4", "fp4", "int4", tuple(range(16)), [i / 8 - 1 for i in range(16)])),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    search=st.sampled_from(("absmax", "mse")),
    compute=st.just("int8"),
    outlier_threshold=st.sampled_from((None, 6, 2.5)),
    skip=st.sampled_from(((), ["lm_head"], ("a", "b.*"))),
    overrides=st.sampled_from(({}, {"a": "int8"}, {"b": {"block_size": 32}, "c": None}, {"d": {"format": INT4}})),
)


@given(configs)
def test_configurations_survive_json(config):
    restored = QuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored.to_dict() == config.to_dict()
    assert restored.format == config.format
    assert restored.skip == config.skip
    assert hash(restored) == hash(config)
    assert torch.equal(restored.codebook, config.codebook)


def test_format_name_of_numbers_is_custom():
    config = QuantConfig(format=torch.linspace(-1, 1, 16))
    assert config.format_name == "custom"
    assert config.codebook.tolist() == torch.linspace(-1, 1, 16).tolist()


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"unknown fields \['bits'\]; known are format, block_size"):
        QuantConfig.from_dict({"bits": 4})


def test_one_pattern_may_be_given_as_a_string():
    assert QuantConfig(skip="lm_head").skip == ("lm_head",)
