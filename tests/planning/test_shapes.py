"""Parameters that are counted without weights: by formula, by transformers, and as their publishers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, write_model

import nybble
from nybble.errors import CheckpointError
from nybble.planning import BUILT_IN, find_shape, shape_of
from nybble.planning.shapes import _of_fields

transformers = pytest.importorskip("transformers")

#: What model cards and checkpoints' indices say.
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-2-13B": 13_015_864_320,
    "Mistral-7B": 7_248_023_552,
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-8B": 8_190_735_360,
}

SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
#: Model type, model class, what its configuration says besides.
DECODERS = (
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": False}),
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": False, "head_dim": 32}),
    ("mistral", "MistralForCausalLM", {"tie_word_embeddings": False}),
    ("qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    ("qwen3", "Qwen3ForCausalLM", {"tie_word_embeddings": False, "head_dim": 32}),
    ("mixtral", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}),
)


def on_meta(kind: str, cls: str, **settings: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **settings)
    with torch.device("meta"):
        return getattr(transformers, cls)(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_built_in_shape_has_the_published_number_of_parameters(name: str) -> None:
    assert BUILT_IN[name].parameters == PUBLISHED[name]


@pytest.mark.parametrize(("kind", "cls", "settings"), DECODERS)
def test_the_formula_counts_what_transformers_builds(kind: str, cls: str, settings: dict[str, Any]) -> None:
    model = on_meta(kind, cls, **{**SMALL, **settings})
    counted = shape_of(model)
    found = _of_fields(Path("config.json"), "small", model.config.to_dict())
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    for field in ("parameters", "hidden", "layers", "heads", "kv_heads", "head_dim", "vocab", "tied", "gated", "ffn"):
        assert getattr(found, field) == getattr(counted, field), field
    assert found.packed == counted.packed == found.linear
    assert sorted((m.out_features, m.in_features, m.count) for m in found.matrices) == sorted(
        (m.out_features, m.in_features, m.count) for m in counted.matrices
    )


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Qwen2.5-7B", "Llama-3.1-8B", "Qwen3-8B"])
def test_a_built_in_shape_is_that_of_the_model_in_transformers(name: str) -> None:
    shape = BUILT_IN[name]
    kind, cls = ("qwen3", "Qwen3") if "Qwen3" in name else ("qwen2", "Qwen2") if "Qwen" in name else ("llama", "Llama")
    model = on_meta(
        kind,
        f"{cls}ForCausalLM",
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
    )
    assert shape_of(model).parameters == shape.parameters


@pytest.mark.parametrize(
    ("kind", "cls", "settings", "gated"),
    [
        ("bert", "BertModel", {}, False),
        ("gpt2", "GPT2LMHeadModel", {"n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 320}, False),
        ("gemma2", "Gemma2ForCausalLM", {"head_dim": 32}, True),
        ("phi3", "Phi3ForCausalLM", {}, True),
        ("gpt_neox", "GPTNeoXForCausalLM", {}, False),
    ],
)
def test_other_architectures_are_counted_on_the_meta_device(
    kind: str, cls: str, settings: dict[str, Any], gated: bool
) -> None:
    model = on_meta(kind, cls, **{**SMALL, **settings})
    shape = shape_of(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.hidden, shape.layers, shape.heads, shape.gated) == (96, 3, 6, gated)
    assert shape.head == (cls != "BertModel")
    assert 0 < shape.linear < shape.parameters


def test_a_directory_and_its_file_have_one_shape(tmp_path: Path) -> None:
    write_model(tmp_path / "small")
    shape = find_shape(tmp_path / "small")
    assert shape.parameters == sum(p.numel() for p in llama().parameters())
    assert find_shape(tmp_path / "small" / "config.json") == shape
    other = tmp_path / "other.json"
    other.write_text((tmp_path / "small" / "config.json").read_text())
    assert find_shape(other).parameters == shape.parameters


def test_a_quantized_checkpoint_is_known_as_one(tmp_path: Path) -> None:
    write_model(tmp_path / "plain", torch.bfloat16)
    nybble.quantize(tmp_path / "plain", tmp_path / "packed", nybble.QuantConfig())
    plain, packed = find_shape(tmp_path / "plain"), find_shape(tmp_path / "packed")
    assert packed.quantized and not plain.quantized
    assert packed.parameters == plain.parameters


def test_names_are_found_whatever_their_case_and_owner() -> None:
    assert find_shape("meta-llama/llama-3.1-8b") is BUILT_IN["Llama-3.1-8B"]


def test_an_unknown_name_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean Llama-3\.1-8B.*Qwen2\.5-7B.*config\.json"):
        find_shape("Llama-3.1-8")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        find_shape(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("[1]", "holds a list"), ('{"model_type": "nonsense"}', "cannot build")],
)
def test_a_damaged_configuration_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        find_shape(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_without_transformers_fields_are_checked_by_name() -> None:
    config = {**SMALL, "model_type": "llama", "hidden_size": "wide"}
    with pytest.raises(CheckpointError, match=r"hidden_size is 'wide'"):
        _of_fields(Path("config.json"), "x", json.loads(json.dumps(config)))
    with pytest.raises(CheckpointError, match=r"model_type is 'bert'.*transformers"):
        _of_fields(Path("config.json"), "x", {"model_type": "bert"})
