"""The architectures that cross between Hugging Face and GGUF: their sizes, and their tensors under both names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import MODEL_ARCH_NAMES, RopeScalingType, get_tensor_name_map

from ...errors import CheckpointError
from . import rope

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """What tells one architecture from another.

    model_type: transformers' name, the one that an import writes. gguf_name: GGUF's. permuted: whether q and k rows are
    in llama.cpp's own rotary order. qkv_bias: True or False where it is fixed, None where the configuration says.
    mlp_bias: whether the configuration may ask for biases in the MLP. qk_norm: whether heads are normalized.
    """

    model_type: str
    gguf_name: str
    class_name: str
    permuted: bool = False
    qkv_bias: bool | None = False
    mlp_bias: bool = False
    qk_norm: bool = False


_LLAMA = Family("llama", "llama", "LlamaForCausalLM", permuted=True, qkv_bias=None, mlp_bias=True)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": Family("mistral", "llama", "MistralForCausalLM", permuted=True),
    "qwen2": Family("qwen2", "qwen2", "Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("qwen3", "qwen3", "Qwen3ForCausalLM", qk_norm=True),
}
_BY_GGUF_NAME = {"llama": _LLAMA, "qwen2": FAMILIES["qwen2"], "qwen3": FAMILIES["qwen3"]}

# Keys below `<architecture>.` that an import understands, or that do not change what the model computes. Any other one
# with a value might: then the file is refused rather than turned into a model that computes something else.
_KNOWN_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.causal", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scale_linear",
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A tensor under both names; `rope_heads` > 0 where its rows are permuted, that many heads at a time."""

    hf_name: str
    gguf_name: str
    shape: tuple[int, ...]
    rope_heads: int = 0


@dataclass
class Model:
    """The sizes of a decoder-only model, as both formats state them."""

    family: Family
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    epsilon: float
    theta: float
    scaling: dict[str, Any] | None
    tied: bool
    qkv_bias: bool
    mlp_bias: bool

    def tensors(self) -> Iterator[Planned]:
        """Every tensor of the model, in the order of the layers."""
        names = get_tensor_name_map(_arch(self.family), self.layers)
        for hf_name, shape, heads in self._hf_tensors():
            gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise CheckpointError(f"the installed gguf has no name for {hf_name!r}; a newer one is needed")
            yield Planned(hf_name, gguf_name, shape, heads if self.family.permuted else 0)

    def _hf_tensors(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """(Hugging Face name, shape, number of heads whose rows are in rotary order)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden), 0
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.input_layernorm.weight", (self.hidden,), 0
            for part, rows, heads in (("q", q, self.heads), ("k", kv, self.kv_heads), ("v", kv, 0)):
                yield f"{at}.self_attn.{part}_proj.weight", (rows, self.hidden), heads
                if self.qkv_bias:
                    yield f"{at}.self_attn.{part}_proj.bias", (rows,), heads
            yield f"{at}.self_attn.o_proj.weight", (self.hidden, q), 0
            if self.qkv_bias and self.family is _LLAMA:  # transformers' Llama has all four or none
                yield f"{at}.self_attn.o_proj.bias", (self.hidden,), 0
            if self.family.qk_norm:
                yield f"{at}.self_attn.q_norm.weight", (self.head_dim,), 0
                yield f"{at}.self_attn.k_norm.weight", (self.head_dim,), 0
            yield f"{at}.post_attention_layernorm.weight", (self.hidden,), 0
            for part in ("gate", "up", "down"):
                shape = (self.hidden, self.ffn) if part == "down" else (self.ffn, self.hidden)
                yield f"{at}.mlp.{part}_proj.weight", shape, 0
                if self.mlp_bias:
                    yield f"{at}.mlp.{part}_proj.bias", shape[:1], 0
        yield "model.norm.weight", (self.hidden,), 0
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden), 0


def _arch(family: Family) -> Any:
    found = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.gguf_name]
    if not found:
        raise CheckpointError(f"the installed gguf does not know {family.gguf_name!r}; a newer one is needed")
    return found[0]


class _Values:
    """Numbers of a configuration, each checked for type and sign; `where` begins every message."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # GGUF may state a figure layer by layer
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 1 << 31:
            raise CheckpointError(f"{self.where}: {key} is {value!r}; a positive whole number is needed")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self.where}: {key} is {value!r}; a positive number is needed")
        return float(value)


def _unsupported(where: Path | str, what: str, name: Any) -> CheckpointError:
    return CheckpointError(f"{where}: {what} is {name!r}; supported are {', '.join(FAMILIES)}")


def from_config(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: Path, context: int | None = None
) -> Model:
    """The model that a config.json describes.

    Args:
        config: its content.
        shapes: of the tensors present, by Hugging Face name.
        where: the file, for messages.
        context: context length to state instead of the configuration's, no longer than that.

    Raises:
        CheckpointError: another architecture, or a feature that llama.cpp has no counterpart for.
    """
    family = FAMILIES.get(config.get("model_type") or "")
    if family is None:
        raise _unsupported(where, "model_type", config.get("model_type"))
    values = _Values(config, str(where))
    heads, hidden = values.count("num_attention_heads"), values.count("hidden_size")
    longest = values.count("max_position_embeddings")
    if context is not None and not 0 < context <= longest:
        raise ValueError(f"context is {context}; the model of {where} allows 1 to {longest}")
    _check_features(config, family, where, context or longest)
    try:
        scaling = rope.scaling_of(config)
        if scaling and scaling["rope_type"] == "llama3" and family.gguf_name != "llama":
            raise ValueError(f"rope_type 'llama3' is not supported in {family.model_type} models")
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    tied = bool(config.get("tie_word_embeddings")) or (
        "tie_word_embeddings" not in config and "lm_head.weight" not in shapes
    )
    bias = bool(config.get("attention_bias")) if family.qkv_bias is None else family.qkv_bias
    embedding = shapes.get("model.embed_tokens.weight", (0,))
    return Model(
        family=family,
        hidden=hidden,
        ffn=values.count("intermediate_size"),
        layers=values.count("num_hidden_layers"),
        heads=heads,
        kv_heads=values.count("num_key_value_heads", heads),
        head_dim=values.count("head_dim", 128 if family.qk_norm else hidden // heads),
        vocabulary=embedding[0] or values.count("vocab_size"),
        context=context or longest,
        epsilon=values.real("rms_norm_eps", 1e-6),
        theta=rope.theta_of(config),
        scaling=scaling,
        tied=tied,
        qkv_bias=bias,
        mlp_bias=family.mlp_bias and bool(config.get("mlp_bias")),
    )


def _check_features(config: Mapping[str, Any], family: Family, where: Path, context: int) -> None:
    """Refuse what llama.cpp would compute differently."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{where}: hidden_act is {activation!r}; {family.model_type} models need 'silu'")
    for key, fixed in (("attention_bias", family.qkv_bias is None), ("mlp_bias", family.mlp_bias)):
        if config.get(key) and not fixed:
            raise CheckpointError(f"{where}: {key} is not supported in {family.model_type} models")
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", family.model_type == "mistral")
    if used and type(window) is int and window < context:
        raise CheckpointError(
            f"{where}: attention sees {window} tokens (sliding_window), which llama.cpp does not do for "
            f"{family.model_type}; up to that length nothing differs: ask for a context of {window}"
        )


def write_metadata(model: Model, writer: gguf.GGUFWriter) -> None:
    """State the model's sizes in a GGUF file."""
    writer.add_vocab_size(model.vocabulary)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_rope_freq_base(model.theta)
    writer.add_rope_dimension_count(model.head_dim)
    if model.family.qk_norm or model.head_dim * model.heads != model.hidden:
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
    kind = (model.scaling or {}).get("rope_type")
    if model.scaling and kind in {"linear", "yarn"}:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(model.scaling["factor"]))
    if model.scaling and kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(model.scaling["original_max_position_embeddings"]))


def from_metadata(file: Any) -> Model:
    """The model that the metadata of a `GGUFFile` describes.

    Raises:
        CheckpointError: another architecture, a missing or impossible figure, or a key that may change the computation.
    """
    where, fields = str(file.path), file.fields
    name = fields.get("general.architecture")
    family = _BY_GGUF_NAME.get(name) if isinstance(name, str) else None
    if family is None:
        raise _unsupported(where, "general.architecture", name)
    parts = fields.get("split.count", 1)
    if parts != 1:
        raise CheckpointError(f"{where}: one of {parts} parts; join them with llama-gguf-split --merge first")
    own = {key.removeprefix(f"{name}."): value for key, value in fields.items() if key.startswith(f"{name}.")}
    unknown = sorted(key for key, value in own.items() if key not in _KNOWN_KEYS and value)
    if unknown or own.get("attention.causal") is False:
        key = unknown[0] if unknown else "attention.causal"
        raise CheckpointError(f"{where}: {name}.{key} is {own[key]!r}, which has no counterpart in {family.class_name}")
    values = _Values(own, where)
    hidden, heads = values.count("embedding_length"), values.count("attention.head_count")
    head_dim = values.count("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.count(key, head_dim) != head_dim:
            raise CheckpointError(f"{where}: {name}.{key} is {own[key]}, only the head's {head_dim} is supported")
    layers = values.count("block_count")
    if layers > len(file.tensors):
        raise CheckpointError(f"{where}: {layers} blocks claimed, but there are only {len(file.tensors)} tensors")
    embedding = file.tensors.get("token_embd.weight")
    return Model(
        family=family,
        hidden=hidden,
        ffn=values.count("feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=values.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocabulary=embedding.rows if embedding else values.count("vocab_size"),
        context=values.count("context_length"),
        # The file holds fp32's neighbour of a short decimal number such as 1e-5.
        epsilon=float(f"{values.real('attention.layer_norm_rms_epsilon'):.6g}"),
        theta=values.real("rope.freq_base", 10000.0),
        scaling=_scaling_from(own, values, file, head_dim),
        tied="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors if family.qkv_bias is None else family.qkv_bias,
        mlp_bias=family.mlp_bias and "blk.0.ffn_gate.bias" in file.tensors,
    )


def _scaling_from(own: Mapping[str, Any], values: _Values, file: Any, head_dim: int) -> dict[str, Any] | None:
    kind = own.get("rope.scaling.type") or ("linear" if own.get("rope.scale_linear") else "none")
    factors = file.tensors.get(ROPE_FACTORS)
    if kind not in {"none", "linear", "yarn"} or (factors is not None and kind != "none"):
        raise CheckpointError(f"{values.where}: rope.scaling.type is {kind!r}; supported are none, linear and yarn")
    if factors is not None:
        if factors.shape != (head_dim // 2,):
            raise CheckpointError(f"{values.where}: tensor {ROPE_FACTORS!r} has shape {list(factors.shape)}")
        try:
            row = file.read_rows(factors, 0, 1)[0]
            return rope.llama3_scaling(row, head_dim, values.real("rope.freq_base", 10000.0))
        except ValueError as error:
            raise CheckpointError(f"{values.where}: tensor {ROPE_FACTORS!r}: {error}") from error
    if kind == "none":
        return None
    factor = values.real("rope.scaling.factor" if "rope.scaling.factor" in own else "rope.scale_linear")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = values.count("rope.scaling.original_context_length", values.count("context_length"))
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}


def to_config(model: Model, dtype: str) -> dict[str, Any]:
    """The content of config.json, in the spelling that transformers 4 and 5 both read."""
    config = {
        "architectures": [model.family.class_name],
        "model_type": model.family.model_type,
        "attention_dropout": 0.0,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "initializer_range": 0.02,
        "intermediate_size": model.ffn,
        "max_position_embeddings": model.context,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": model.epsilon,
        "rope_theta": model.theta,
        "rope_scaling": model.scaling,
        "tie_word_embeddings": model.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": model.vocabulary,
    }
    if model.family is _LLAMA:
        config |= {"attention_bias": model.qkv_bias, "mlp_bias": model.mlp_bias}
    if model.family.model_type.startswith("qwen"):
        config |= {"use_sliding_window": False, "sliding_window": None}
    if model.family.model_type == "qwen3":
        config["attention_bias"] = False
    return config
