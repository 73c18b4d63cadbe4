"""What a model is made of, without its weights: from a config.json, or by the name of a well-known one.

The parameters of a config.json are counted on the model that transformers builds on the meta device, where it is
installed; those of built-in names, and of the plain decoders without transformers, by the formula of `decoder`, which
agrees with it.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError


@dataclass(frozen=True)
class Matrix:
    """Linear layers of one shape and place, such as the query projections of all layers.

    Attributes:
        name: the last parts of their names.
        out_features, in_features: of one of them. count: how many the model has. bias: whether they have one.
        plain: whether they are nn.Linear modules, which quantized layers and LoRA stand in for; False for experts in
            one tensor of three dimensions (quantized, but not adapted) and for GPT-2's transposed layers (neither).
        quantizable: whether `nybble quantize` packs them.
    """

    name: str
    out_features: int
    in_features: int
    count: int
    bias: bool = False
    plain: bool = True
    quantizable: bool = True

    @property
    def weights(self) -> int:
        """Weights of all of them, without biases."""
        return self.out_features * self.in_features * self.count


@dataclass(frozen=True)
class Shape:
    """A transformer's sizes.

    Attributes:
        name: how messages call it. source: where the sizes are from.
        hidden, ffn, layers, heads, kv_heads, head_dim: as usual; ffn is what a token goes through, so of a mixture of
            experts that of the experts that act on it.
        vocab: rows of the input embedding. context: longest text, where known.
        tied: whether the head is the embedding. gated: whether the feed-forward is gated.
        head: whether there is a head over the vocabulary; without one it is an encoder.
        causal: whether that head's model writes text from left to right, as `nybble finetune` and `generate` need it;
            not so of masked language models and of encoder-decoders, whose `layers` are those of both stacks.
        matrices: all linear layers but the head.
        norms: of the hidden width, a layer. query_norm: whether queries and keys are normalized head by head.
        scores: bytes of each score that attention keeps, where transformers computes it in the open: softmax in fp32
            and bf16, and what a soft cap keeps (Gemma 2). capped: whether logits are capped softly.
        shared: width of the experts that act on every token, a part of `ffn`.
        parameters: all of them, tied ones once. quantized: whether config.json says that the weights are packed.
        stored: the dtype that config.json names, if it does.
    """

    name: str
    source: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    gated: bool
    matrices: tuple[Matrix, ...]
    parameters: int
    context: int | None = None
    head: bool = True
    causal: bool = True
    experts: int = 0
    quantized: bool = False
    stored: str | None = None
    norms: int = 2
    query_norm: bool = False
    scores: int = 0
    capped: bool = False
    shared: int = 0

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys of a token; its values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding."""
        return self.vocab * self.hidden

    @property
    def linear(self) -> int:
        """Weights of all linear layers but the head, without biases."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def packed(self) -> int:
        """Weights that `nybble quantize` packs."""
        return sum(matrix.weights for matrix in self.matrices if matrix.quantizable)


_OPEN_SCORES, _CAPPED_SCORES = 6, 8


def decoder(
    name: str,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    tied: bool = False,
    *,
    head_dim: int | None = None,
    bias: tuple[str, ...] = (),
    query_norm: bool = False,
    norms: int = 2,
    capped: bool = False,
    fused: bool = False,
    experts: int = 0,
    active: int = 0,
    context: int | None = None,
    source: str = "built-in",
    quantized: bool = False,
) -> Shape:
    """A decoder of Llama's build: RMSNorm, grouped queries, a gated feed-forward.

    Args:
        bias: the projections that have one. query_norm: queries and keys are normalized head by head (Qwen3).
        norms: of a layer; Gemma has two after its parts too. capped: scores and logits. fused: queries, keys and
            values are one projection, gate and up another (Phi).
        experts, active: of a mixture with a router (Mixtral): how many a layer has, and act on a token.

    >>> decoder("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256).parameters
    8030261248
    """
    head_dim = hidden // heads if head_dim is None else head_dim
    queries, keys = heads * head_dim, kv_heads * head_dim
    sizes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    if fused:
        del sizes["q_proj"], sizes["k_proj"], sizes["v_proj"]
        sizes = {"qkv_proj": (queries + 2 * keys, hidden), **sizes}
    matrices = [Matrix(f"self_attn.{n}", *size, layers, n in bias) for n, size in sizes.items()]
    normed = norms * layers * hidden + hidden + (2 * layers * head_dim if query_norm else 0)
    routers = 0
    if experts:
        matrices += [
            Matrix("experts.gate_up_proj", 2 * ffn, hidden, layers * experts, plain=False),
            Matrix("experts.down_proj", hidden, ffn, layers * experts, plain=False),
        ]
        routers = layers * experts * hidden
    else:
        both = {"gate_up_proj": (2 * ffn, hidden)} if fused else {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden)}
        sizes = {**both, "down_proj": (hidden, ffn)}
        matrices += [Matrix(f"mlp.{n}", *size, layers, n in bias) for n, size in sizes.items()]
    biases = sum(m.out_features * m.count for m in matrices if m.bias)
    embeddings = vocab * hidden * (1 if tied else 2)
    return Shape(
        name, source, hidden, ffn * max(1, active), layers, heads, kv_heads, head_dim, vocab, tied, True,
        tuple(matrices), sum(m.weights for m in matrices) + biases + normed + routers + embeddings,
        context, True, True, experts, quantized, None, norms, query_norm, _CAPPED_SCORES if capped else 0, capped,
    )  # fmt: skip


_QKV = ("q_proj", "k_proj", "v_proj")
_QWEN2: dict[str, Any] = {"bias": _QKV, "context": 32768}
_LLAMA3: dict[str, Any] = {"context": 131072}
_LLAMA2: dict[str, Any] = {"context": 4096}
_QWEN3: dict[str, Any] = {"head_dim": 128, "query_norm": True, "context": 40960}
_GEMMA2: dict[str, Any] = {"norms": 4, "capped": True, "context": 8192}

#: As their publishers' config.json files have them.
BUILT_IN: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        decoder("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152, True, context=8192),
        decoder("SmolLM2-360M", 960, 2560, 32, 15, 5, 49152, True, context=8192),
        decoder("SmolLM2-1.7B", 2048, 8192, 24, 32, 32, 49152, True, context=8192),
        decoder("TinyLlama-1.1B", 2048, 5632, 22, 32, 4, 32000, context=2048),
        decoder("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256, True, **_LLAMA3),
        decoder("Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128256, True, **_LLAMA3),
        decoder("Llama-3-8B", 4096, 14336, 32, 32, 8, 128256, context=8192),
        decoder("Llama-3-70B", 8192, 28672, 80, 64, 8, 128256, context=8192),
        decoder("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256, **_LLAMA3),
        decoder("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128256, **_LLAMA3),
        decoder("Llama-3.1-405B", 16384, 53248, 126, 128, 8, 128256, **_LLAMA3),
        decoder("Llama-3.3-70B", 8192, 28672, 80, 64, 8, 128256, **_LLAMA3),
        decoder("Llama-2-7B", 4096, 11008, 32, 32, 32, 32000, **_LLAMA2),
        decoder("Llama-2-13B", 5120, 13824, 40, 40, 40, 32000, **_LLAMA2),
        decoder("Llama-2-70B", 8192, 28672, 80, 64, 8, 32000, **_LLAMA2),
        decoder("Mistral-7B", 4096, 14336, 32, 32, 8, 32768, context=32768),
        decoder("Mistral-7B-v0.1", 4096, 14336, 32, 32, 8, 32000, context=32768),
        decoder("Mistral-Nemo-12B", 5120, 14336, 40, 32, 8, 131072, head_dim=128, context=131072),
        decoder("Mistral-Small-24B", 5120, 32768, 40, 32, 8, 131072, head_dim=128, context=32768),
        decoder("Mixtral-8x7B", 4096, 14336, 32, 32, 8, 32000, experts=8, active=2, context=32768),
        decoder("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 151936, True, **_QWEN2),
        decoder("Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 151936, True, **_QWEN2),
        decoder("Qwen2.5-3B", 2048, 11008, 36, 16, 2, 151936, True, **_QWEN2),
        decoder("Qwen2.5-7B", 3584, 18944, 28, 28, 4, 152064, **_QWEN2),
        decoder("Qwen2.5-14B", 5120, 13824, 48, 40, 8, 152064, **_QWEN2),
        decoder("Qwen2.5-32B", 5120, 27648, 64, 40, 8, 152064, **_QWEN2),
        decoder("Qwen2.5-72B", 8192, 29568, 80, 64, 8, 152064, **_QWEN2),
        decoder("Qwen3-0.6B", 1024, 3072, 28, 16, 8, 151936, True, **_QWEN3),
        decoder("Qwen3-1.7B", 2048, 6144, 28, 16, 8, 151936, True, **_QWEN3),
        decoder("Qwen3-4B", 2560, 9728, 36, 32, 8, 151936, True, **_QWEN3),
        decoder("Qwen3-8B", 4096, 12288, 36, 32, 8, 151936, **_QWEN3),
        decoder("Qwen3-14B", 5120, 17408, 40, 40, 8, 151936, **_QWEN3),
        decoder("Qwen3-32B", 5120, 25600, 64, 64, 8, 151936, **_QWEN3),
        decoder("Qwen3-30B-A3B", 2048, 768, 48, 32, 4, 151936, experts=128, active=8, **_QWEN3),
        decoder("Gemma-2-2B", 2304, 9216, 26, 8, 4, 256000, True, head_dim=256, **_GEMMA2),
        decoder("Gemma-2-9B", 3584, 14336, 42, 16, 8, 256000, True, head_dim=256, **_GEMMA2),
        decoder("Gemma-2-27B", 4608, 36864, 46, 32, 16, 256000, True, head_dim=128, **_GEMMA2),
        decoder(
            "Gemma-3-1B", 1152, 6912, 26, 4, 1, 262144, True, head_dim=256, query_norm=True, norms=4, context=32768
        ),
        decoder("Phi-3-mini", 3072, 8192, 32, 32, 32, 32064, fused=True, context=4096),
        decoder("Phi-4", 5120, 17920, 40, 40, 10, 100352, fused=True, context=16384),
        decoder("Phi-4-mini", 3072, 8192, 32, 24, 8, 200064, True, fused=True, context=131072),
    )
}
#: Parts of a name that say how a model was trained further or written down, not how it is built.
_SAME_BUILD = {"instruct", "it", "chat", "base", "hf", "pt"}
#: Their releases by other names.
_RELEASES = {
    "mistral-7b-v0.2": "Mistral-7B-v0.1",
    "mistral-7b-v0.3": "Mistral-7B",
    "mixtral-8x7b-v0.1": "Mixtral-8x7B",
    "mistral-nemo-2407": "Mistral-Nemo-12B",
    "mistral-small-24b-2501": "Mistral-Small-24B",
    "phi-3-mini-4k": "Phi-3-mini",
}


def find_shape(model: str | os.PathLike[str]) -> Shape:
    """The shape of a directory with a config.json, of such a file, or of a built-in name.

    Of a name, neither its case nor its owner matter, nor -Instruct, -chat, -it and the like: meta-llama/Llama-2-7b-hf.

    Raises:
        CheckpointError: config.json is damaged, or names a model that neither transformers nor the formula knows; or
            there is a GGUF file instead.
        ValueError: neither a path nor a name that is built in; the message has those that are.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file() and (found := next(iter(sorted(path.glob("*.gguf"))), None)):
            raise _gguf(found)
        return _of_config(path / "config.json")
    if path.suffix == ".gguf" and path.exists():
        raise _gguf(path)
    if path.is_file():
        return _of_config(path)
    names = {name.lower(): name for name in BUILT_IN}
    key = str(model).rpartition("/")[2].lower()  # meta-llama/Llama-3.1-8B
    parts = key.removeprefix("meta-").split("-")
    short = "-".join(part for part in parts if part not in _SAME_BUILD)
    for known in (key, short):
        if found_name := names.get(known) or _RELEASES.get(known):
            return BUILT_IN[found_name]
    close = difflib.get_close_matches(short, names, 3, 0.5)
    hint = f"; did you mean {' or '.join(names[name] for name in close)}?" if close else "."
    raise ValueError(
        f"model is {str(model)!r}: no such file or directory, and no built-in shape{hint} Any other needs its "
        f"config.json: that file or its directory, no weights. Built in are {', '.join(BUILT_IN)}"
    )


def _gguf(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file}: a GGUF file, which has no config.json; `nybble import {file} DIRECTORY` writes a directory that does"
    )


def _of_config(file: Path) -> Shape:
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: no config.json there, so the model's shape is unknown")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: holds a {type(config).__name__}; a JSON object is needed")
    name = file.parent.resolve().name if file.name == "config.json" else file.stem
    if find_spec("transformers") is not None:
        shape = _of_skeleton(file, name, "quantization_config" in config)
    else:
        shape = _of_fields(file, name, config)
    return replace(shape, stored=config.get("dtype") or config.get("torch_dtype"))


# ---- by transformers -------------------------------------------------------------------------------------------------


def _of_skeleton(file: Path, name: str, quantized: bool) -> Shape:
    from ..checkpoint.load import skeleton

    if file.name == "config.json":
        model: Any = skeleton(file.parent, values=False)
    else:
        with tempfile.TemporaryDirectory() as directory:
            shutil.copyfile(file, Path(directory) / "config.json")
            try:
                model = skeleton(Path(directory), values=False)
            except CheckpointError as error:
                raise CheckpointError(f"{file}: {error}") from error
    return shape_of(model, name, quantized=quantized)


def shape_of(model: Any, name: str | None = None, *, quantized: bool = False) -> Shape:
    """The shape of a model of transformers, which may be on the meta device; its parameters are counted.

    Raises:
        ValueError: its configuration does not say how many layers and heads it has, or it has no embedding.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    name = name or type(model).__name__
    table = model.get_input_embeddings()
    sizes = {
        field: _first(config, *names)
        for field, names in (
            ("hidden", ("hidden_size", "d_model", "n_embd", "dim")),
            ("layers", ("num_hidden_layers", "n_layer", "num_layers", "n_layers")),
            ("heads", ("num_attention_heads", "n_head", "n_heads")),
        )
    }
    missing = [field for field, value in sizes.items() if value is None]
    if missing or getattr(table, "weight", None) is None:
        raise ValueError(f"{name}: its configuration does not tell {', '.join(missing) or 'its input embedding'}")
    hidden, layers, heads = (int(sizes[field]) for field in ("hidden", "layers", "heads"))
    both = bool(getattr(config, "is_encoder_decoder", False))
    if both:
        layers += int(_first(config, "num_decoder_layers", "decoder_layers") or layers)
    head = model.get_output_embeddings()
    matrices = _matrices(model, head)
    kv_heads = int(_first(config, "num_key_value_heads") or heads)
    gated = any(part in m.name for m in matrices for part in ("gate_proj", "gate_up_proj", "w1", "Wi"))
    experts = int(_first(config, "num_local_experts", "num_experts", "n_routed_experts") or 0)
    shared = 0
    width = int(_first(config, "intermediate_size", "n_inner", "ffn_dim", "hidden_dim") or 4 * hidden)
    if experts:
        active = int(_first(config, "num_experts_per_tok") or 1)
        each = int(_first(config, "moe_intermediate_size") or width)
        shared = int(_first(config, "shared_expert_intermediate_size") or 0)
        shared += each * int(_first(config, "n_shared_experts") or 0)
        width = each * active + shared
    return Shape(
        name=name,
        source="config.json, counted by transformers",
        hidden=hidden,
        ffn=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(config) or hidden // heads,
        vocab=table.weight.shape[0],
        tied=head is not None and head.weight is table.weight,
        gated=gated,
        matrices=matrices,
        parameters=sum(p.numel() for p in model.parameters()),  # parameters() has a tied one once
        context=_first(config, "max_position_embeddings", "n_positions"),
        head=head is not None,
        causal=head is not None and not both and (not hasattr(model, "can_generate") or model.can_generate()),
        experts=experts,
        quantized=quantized,
        norms=_norms(model, hidden, layers),
        query_norm=any(path.endswith((".q_norm", ".query_norm")) for path, _ in model.named_modules()),
        scores=_scores(model, config),
        capped=bool(_first(config, "final_logit_softcapping")),
        shared=shared,
    )


def _scores(model: Any, config: Any) -> int:
    if getattr(type(model), "_supports_sdpa", True):
        return 0
    return _CAPPED_SCORES if _first(config, "attn_logit_softcapping") else _OPEN_SCORES


def _norms(model: nn.Module, hidden: int, layers: int) -> int:
    """Norms of the hidden width, a layer; one may stand before or behind all layers."""
    count = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and isinstance(weight, torch.Tensor):
            count += tuple(weight.shape) == (hidden,)
    return max(1, count // layers)


def _head_dim(config: Any) -> int:
    """Of queries and keys; where a part of them is rotated and a part not (DeepSeek), of both. 0: as usual."""
    rotated, rest = (_first(config, name) for name in ("qk_rope_head_dim", "qk_nope_head_dim"))
    return int(rotated + rest if rotated and rest else _first(config, "head_dim") or 0)


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _matrices(model: nn.Module, head: Any) -> tuple[Matrix, ...]:
    counts: Counter[Matrix] = Counter()
    for name, module in model.named_modules():
        if module is head:
            continue
        last = ".".join(part for part in name.split(".")[-2:] if not part.isdigit())
        weight = getattr(module, "weight", None)
        bias = getattr(module, "bias", None) is not None
        if isinstance(module, nn.Linear):
            routes = name.rpartition(".")[2] in ("gate", "router", "shared_expert_gate")
            rows, columns = module.weight.shape
            counts[Matrix(last, rows, columns, 1, bias, not routes, not routes)] += 1
        elif type(module).__name__ == "Conv1D" and weight is not None:
            counts[Matrix(last, weight.shape[1], weight.shape[0], 1, bias, False, False)] += 1
        else:
            for key, value in module.named_parameters(recurse=False):
                if value.dim() == 3:
                    _, rows, columns = value.shape
                    found = Matrix(f"{last}.{key}", rows, columns, 1, plain=False)
                    counts[found] += value.shape[0]
    return tuple(
        Matrix(m.name, m.out_features, m.in_features, count, m.bias, m.plain, m.quantizable)
        for m, count in counts.items()
    )


# ---- by the formula --------------------------------------------------------------------------------------------------

#: Model types of Llama's build, and what is special about them.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"bias": _QKV},
    "qwen3": {"query_norm": True},
    "mixtral": {},
}


def _of_fields(file: Path, name: str, config: Mapping[str, Any]) -> Shape:
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise CheckpointError(
            f"{file}: model_type is {kind!r}; without transformers only {', '.join(_FAMILIES)} can be counted: "
            "pip install 'nybble[hf]'"
        )
    options = dict(_FAMILIES[kind])
    if config.get("attention_bias"):
        options["bias"] = (*_QKV, "o_proj")
    if config.get("mlp_bias"):
        options["bias"] = (*options.get("bias", ()), "gate_proj", "up_proj", "down_proj")
    if kind == "mixtral":
        options |= {"experts": _integer(file, config, "num_local_experts")}
        options |= {"active": _integer(file, config, "num_experts_per_tok")}
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    hidden, ffn, layers, heads = (_integer(file, config, field) for field in fields)
    kv_heads = _integer(file, config, "num_key_value_heads") if config.get("num_key_value_heads") else heads
    head_dim = _integer(file, config, "head_dim") if config.get("head_dim") else None
    return decoder(
        name,
        hidden,
        ffn,
        layers,
        heads,
        kv_heads,
        _integer(file, config, "vocab_size"),
        bool(config.get("tie_word_embeddings", False)),
        head_dim=head_dim,
        context=config.get("max_position_embeddings"),
        source="config.json, by formula",
        quantized="quantization_config" in config,
        **options,
    )


def _integer(file: Path, config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{file}: {field} is {value!r}; it must be an integer of 1 or more")
    return value
