"""Tiny random causal models of several architectures, and generation as it is defined: whole forwards, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import llama

transformers = pytest.importorskip("transformers")

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
_GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 256}
_BLOOM: dict[str, Any] = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}
_OPT = {k: v for k, v in _SIZES.items() if k not in ("intermediate_size", "num_key_value_heads", "initializer_range")}

#: name -> (prefix of transformers' classes, settings)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_SIZES, "num_key_value_heads": 4}),
    "llama-gqa": ("Llama", _SIZES),
    "qwen2-bias": ("Qwen2", _SIZES),
    "qwen3-norms": ("Qwen3", {**_SIZES, "head_dim": 16}),
    "mistral-window": ("Mistral", {**_SIZES, "sliding_window": 7}),
    "gemma": ("Gemma", {**_SIZES, "head_dim": 16}),
    "gemma3-window": ("Gemma3", {**_SIZES, "head_dim": 16, "sliding_window": 6, "num_hidden_layers": 6}),
    "phi3": ("Phi3", _SIZES),
    "granite": ("Granite", {**_SIZES, "residual_multiplier": 0.5, "logits_scaling": 3.0}),
    "gpt2": ("GPT2", {**_GPT2, "bos_token_id": 0, "eos_token_id": 0}),
    "bloom": ("Bloom", {**_BLOOM, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}),
    "opt": ("OPT", {**_OPT, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.1}),
    "mamba": ("Mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "eos_token_id": 0}),
}


def decoder(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of ARCHITECTURES, with norms that are not all 1."""
    prefix, settings = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")(**settings)
    model = getattr(transformers, f"{prefix}LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name in ("mamba", "gpt2", "bloom"):  # their initialization takes no range
                parameter.mul_(3)
    return model.to(dtype).eval()


def greedy(model: Any, ids: Sequence[int], count: int, end: int | None = 0) -> list[int]:
    """The likeliest token after all before it, `count` times, each from a forward over everything."""
    ids, chosen = list(ids), []
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        chosen.append(int(logits.argmax()))
        ids.append(chosen[-1])
        if chosen[-1] == end:
            break
    return chosen


__all__ = ["ARCHITECTURES", "decoder", "greedy", "llama"]
