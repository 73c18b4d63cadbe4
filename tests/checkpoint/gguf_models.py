"""Tiny models of the architectures that cross to GGUF, each with a byte-level BPE tokenizer trained here."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

TEXT = (
    "a nybble is four bits, and 2 of them make 1 byte. it's the small model's turn: don't wait, we'll read on!\n\n"
    "Years 1984, 2001 and 12345 went by; naïve café owners (über-friendly) said: «oui».\t日本語 もある。\n  in\r\n"
) * 20
VOCABULARY = 384
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
SPECIAL = ["<|unk|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@cache
def _trained(pre: str) -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in {"gpt-2", "smollm"})
    steps: list[Any] = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")],
        "dbrx": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")],
    }[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return str(tokenizer.to_str())


def write_tokenizer(directory: Path, pre: str = "smollm", add_bos: bool = False, **settings: Any) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja; a few ids below VOCABULARY have no token."""
    content = json.loads(_trained(pre))
    if add_bos:
        bos = {"SpecialToken": {"id": SPECIAL[1], "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {SPECIAL[1]: {"id": SPECIAL[1], "ids": [1], "tokens": [SPECIAL[1]]}},
        }
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    names = {"unk_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def build(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model of 2 layers, 64 hidden units, 4 heads, 2 of them for keys; norms and biases are random too."""
    torch.manual_seed(seed)
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **({"head_dim": 32} if kind == "qwen3" else {}),
        **changes,
    }
    model = model_class(config_class(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1 if "norm" in name else 0.2)
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def write_model(directory: Path, kind: str, pre: str = "smollm", **changes: Any) -> Path:
    """Save `build(kind, ...)` with its tokenizer; returns the directory."""
    build(kind, **changes).save_pretrained(directory)
    write_tokenizer(directory, pre)
    return directory


#: Name of a case -> (kind, pre-tokenizer, changes to the configuration).
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "smollm", {}),
    "llama, tied": ("llama", "gpt-2", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", "dbrx", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", "smollm", {"head_dim": 32}),
    "llama 3's rope": (
        "llama",
        "llama-bpe",
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "llama, linear rope": ("llama", "smollm", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("mistral", "smollm", {"sliding_window": None}),
    "qwen2": ("qwen2", "qwen2", {"rope_theta": 1000000.0}),
    "qwen2, tied, yarn": (
        "qwen2",
        "qwen2",
        {
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "qwen3": ("qwen3", "qwen2", {}),
}
