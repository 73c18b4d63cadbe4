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
from nybble.planning import BUILT_IN, find_shape, plan, shape_of
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
    "Qwen3-30B-A3B": 30_532_122_624,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-3-1B": 999_885_952,
    "Phi-3-mini": 3_821_079_552,
    "Phi-4": 14_659_507_200,
    "Mistral-7B-v0.1": 7_241_732_096,
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


#: Built-in names by their beginning: model type and the class's name before ForCausalLM.
BUILDS = {
    "SmolLM2": ("llama", "Llama"),
    "TinyLlama": ("llama", "Llama"),
    "Llama": ("llama", "Llama"),
    "Mistral": ("mistral", "Mistral"),
    "Mixtral": ("mixtral", "Mixtral"),
    "Qwen2.5": ("qwen2", "Qwen2"),
    "Qwen3-30B-A3B": ("qwen3_moe", "Qwen3Moe"),
    "Qwen3": ("qwen3", "Qwen3"),
    "Gemma-2": ("gemma2", "Gemma2"),
    "Gemma-3": ("gemma3_text", "Gemma3"),
    "Phi": ("phi3", "Phi3"),
}
ACTIVE = {"Mixtral-8x7B": 2, "Qwen3-30B-A3B": 8}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_shape_is_that_of_the_model_in_transformers(name: str) -> None:
    shape = BUILT_IN[name]
    kind, cls = next(build for start, build in BUILDS.items() if name.startswith(start))
    width = shape.ffn // ACTIVE.get(name, 1)
    experts = {
        "mixtral": {"num_local_experts": shape.experts, "num_experts_per_tok": ACTIVE.get(name)},
        "qwen3_moe": {"num_experts": shape.experts, "num_experts_per_tok": 8, "moe_intermediate_size": width},
    }
    model = on_meta(
        kind,
        f"{cls}ForCausalLM",
        hidden_size=shape.hidden,
        intermediate_size=width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.context,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **experts.get(kind, {}),
    )
    found = shape_of(model)
    for field in ("parameters", "packed", "ffn", "vocab", "tied", "gated", "head", "causal", "context", "experts"):
        assert getattr(found, field) == getattr(shape, field), field

    def sizes(matrices: Any) -> list[tuple[Any, ...]]:
        return sorted((m.out_features, m.in_features, m.count, m.plain, m.bias) for m in matrices if m.quantizable)

    assert sizes(found.matrices) == sizes(shape.matrices)


@pytest.mark.parametrize(
    ("kind", "cls", "settings", "gated"),
    [
        ("bert", "BertModel", {}, False),
        ("gpt2", "GPT2LMHeadModel", {"n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 320}, False),
        ("gemma2", "Gemma2ForCausalLM", {"head_dim": 32}, True),
        ("phi3", "Phi3ForCausalLM", {}, True),
        ("gpt_neox", "GPTNeoXForCausalLM", {}, False),
        ("opt", "OPTForCausalLM", {"ffn_dim": 208, "word_embed_proj_dim": 96}, False),
        ("starcoder2", "Starcoder2ForCausalLM", {}, False),
        ("smollm3", "SmolLM3ForCausalLM", {}, True),
        ("glm4", "Glm4ForCausalLM", {"head_dim": 32}, True),
        ("modernbert", "ModernBertModel", {}, True),
    ],
)
def test_other_architectures_are_counted_on_the_meta_device(
    kind: str, cls: str, settings: dict[str, Any], gated: bool
) -> None:
    model = on_meta(kind, cls, **{**SMALL, **settings})
    shape = shape_of(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.hidden, shape.layers, shape.heads, shape.gated) == (96, 3, 6, gated)
    assert shape.head == shape.causal == cls.endswith(("CausalLM", "LMHeadModel"))
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


MOE = {"moe_intermediate_size": 40, "num_experts_per_tok": 3}


@pytest.mark.parametrize(
    ("kind", "cls", "settings", "width"),
    [
        ("qwen3_moe", "Qwen3MoeForCausalLM", {**MOE, "num_experts": 5, "head_dim": 32}, 3 * 40),
        ("qwen2_moe", "Qwen2MoeForCausalLM", {**MOE, "num_experts": 5, "shared_expert_intermediate_size": 24}, 144),
        ("gpt_oss", "GptOssForCausalLM", {"num_local_experts": 5, "num_experts_per_tok": 3}, 3 * 208),
        (
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            {**MOE, "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 2, "topk_group": 1,
             "first_k_dense_replace": 0, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8},
            5 * 40,
        ),
    ],
)  # fmt: skip
def test_a_token_goes_through_the_experts_that_act_and_the_shared_ones(
    kind: str, cls: str, settings: dict[str, Any], width: int
) -> None:
    model = on_meta(kind, cls, **{**SMALL, **settings})
    shape = shape_of(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.ffn == width and shape.experts > 1 and shape.causal
    if kind == "deepseek_v3":
        assert shape.head_dim == 32  # the part that is rotated and the part that is not


def test_what_does_not_write_from_left_to_right_has_no_commands(tmp_path: Path) -> None:
    t5 = on_meta("t5", "T5ForConditionalGeneration", d_model=96, num_layers=2, num_decoder_layers=3, vocab_size=320)
    masked = on_meta("bert", "BertForMaskedLM", **SMALL)
    for model, layers in ((t5, 5), (masked, 3)):
        shape = shape_of(model)
        assert shape.head and not shape.causal and shape.layers == layers
        found = plan(shape, 8e9)
        assert not any(row.commands for row in found.rows)
        assert any("no command" in note for note in found.notes)
    assert not any("no command" in note for note in plan("Qwen3-8B", 24e9).notes)


def test_a_model_of_text_and_pictures_has_the_sizes_of_its_text(tmp_path: Path) -> None:
    text = {**SMALL, "head_dim": 32}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    )
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(config)
    shape = shape_of(model)
    assert (shape.hidden, shape.ffn, shape.layers, shape.heads, shape.kv_heads, shape.vocab) == (96, 208, 3, 6, 2, 320)
    assert shape.parameters == sum(p.numel() for p in model.parameters()) and shape.causal


def test_a_shape_takes_no_memory_for_the_weights(tmp_path: Path) -> None:
    """Llama 4 fills its experts with zeros as it is built; a terabyte of them here, which no machine would give."""
    config = transformers.Llama4Config(
        text_config={**SMALL, "hidden_size": 1 << 15, "num_attention_heads": 64, "intermediate_size": 1 << 17,
                     "intermediate_size_mlp": 208, "num_local_experts": 16},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    )  # fmt: skip
    config.architectures = ["Llama4ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    assert find_shape(tmp_path).parameters > 500e9


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("meta-llama/llama-3.1-8b", "Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "Llama-3-8B"),
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("google/gemma-2-9b-it", "Gemma-2-9B"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B"),
        ("mistralai/Mistral-7B-v0.1", "Mistral-7B-v0.1"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M"),
    ],
)
def test_names_are_found_whatever_their_case_owner_and_tuning(text: str, name: str) -> None:
    assert find_shape(text) is BUILT_IN[name]


def test_a_gguf_file_says_how_it_becomes_a_directory(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for path in (file, tmp_path):
        with pytest.raises(CheckpointError, match=r"model\.gguf: a GGUF file.*nybble import .*model\.gguf DIRECTORY"):
            find_shape(path)


def test_an_unknown_name_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean Llama-3\.1-8B.*config\.json.*Qwen2\.5-7B"):
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
