"""Which keys make up a quantized weight, and the config.json block that says so."""

from __future__ import annotations

import pytest
import torch

from nybble import QuantConfig, QuantTensor
from nybble.checkpoint import bnb
from nybble.checkpoint.files import DTYPE_NAMES
from nybble.checkpoint.select import is_linear_by_name
from nybble.errors import CheckpointError

CODEBOOK = [i / 8 for i in range(-8, 8)]
CONFIGS = [
    QuantConfig(),
    QuantConfig(format="fp4", block_size=128, double_quant=False),
    QuantConfig(format="int4", block_size=32),
    QuantConfig(format=CODEBOOK, double_quant=False),
    QuantConfig(format="int8"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.format_name)
@pytest.mark.parametrize("shape", [(64, 64), (3, 5), (1, 1), (200, 100)])
@pytest.mark.parametrize("module", ["", "model.layers.0.mlp.up_proj"])
def test_planned_slots_are_what_quantizing_gives(config: QuantConfig, shape: tuple[int, int], module: str) -> None:
    state = QuantTensor.quantize(torch.randn(shape), config).state()
    slots = {slot.name: slot for slot in bnb.slots_for(f"{bnb.prefix_of(module)}weight", shape, config)}
    assert slots.keys() == {bnb.prefix_of(module) + key for key in state}
    for key, value in state.items():
        slot = slots[bnb.prefix_of(module) + key]
        assert slot.dtype == DTYPE_NAMES[value.dtype]
        if slot.shape is None:
            assert value.numel() <= slot.limit
        else:
            assert slot.shape == tuple(value.shape)
    groups = bnb.group([*slots, "model.norm.weight", "x.bias"])
    assert groups.plain == ["model.norm.weight", "x.bias"]
    assert groups.quantized == {module: {key: bnb.prefix_of(module) + key for key in state}}


def test_incomplete_groups() -> None:
    state = "q.weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(CheckpointError, match=r"here: tensor 'q\.weight' is missing"):
        bnb.group([state, "q.weight.absmax"], "here")
    with pytest.raises(CheckpointError, match=r"'q\.weight\.absmax' is missing"):
        bnb.group([state, "q.weight"])
    with pytest.raises(CheckpointError, match="more than one quant_state"):
        bnb.group([state, state.replace("nf4", "fp4"), "q.weight", "q.weight.absmax"])
    with pytest.raises(CheckpointError, match=r"'q\.weight\.absmax' has no quant_state"):
        bnb.group(["q.weight", "q.weight.absmax"])
    with pytest.raises(CheckpointError, match=r"'q\.weight' is missing beside 'q\.SCB'"):
        bnb.group(["q.SCB"])


def test_config_block_is_bitsandbytes_only_where_it_can_read_all() -> None:
    nf4, fp4, int4, int8 = (QuantConfig(format=name) for name in ("nf4", "fp4", "int4", "int8"))
    block = bnb.quantization_config(nf4, [nf4, nf4], "bfloat16", None)
    own = block.pop("nybble")
    assert QuantConfig.from_dict(own) == nf4
    assert block == {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    assert bnb.quantization_config(int8, [int8], "float16", ["lm_head"])["load_in_8bit"]
    for used in ([int4], [nf4, fp4], [nf4, int8]):
        assert bnb.quantization_config(nf4, used, "float16", [])["quant_method"] == "nybble"


def test_a_file_says_nothing_of_how_a_layer_computes() -> None:
    config = QuantConfig(
        compute="int8",
        outlier_threshold=6.0,
        overrides={"a": {"compute": "int8", "outlier_threshold": 3.0, "block_size": 32}, "b": "int8", "c": None},
    )
    stored = bnb.quantization_config(config, [config], "bfloat16", None)["nybble"]
    assert stored["compute"] is None
    assert stored["overrides"] == {"a": {"block_size": 32}, "b": "int8", "c": None}


@pytest.mark.parametrize(
    ("module", "linear"),
    [
        ("model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.mlp.gate_proj", True),
        ("lm_head", True),
        ("embed_out", True),
        ("classifier", True),
        ("model.embed_tokens", False),
        ("transformer.wte", False),
        ("transformer.wpe", False),
        ("shared", False),
        ("embeddings.word_embeddings", False),
        ("embeddings.position_embeddings", False),
        ("embeddings.token_type_embeddings", False),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", False),
        ("model.layers.0.input_layernorm", False),
        ("model.layers.0.mlp.gate", False),
        ("model.layers.0.block_sparse_moe.router", False),
    ],
)
def test_name_rules(module: str, linear: bool) -> None:
    assert is_linear_by_name(module) is linear


def test_transposed_weights_are_no_linear_weights() -> None:
    assert not is_linear_by_name("transformer.h.0.attn.c_attn", "gpt2")
    assert is_linear_by_name("transformer.h.0.attn.c_attn", "gpt_bigcode")
