"""Tiny models of several architectures as checkpoints, each with a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXT, write_model

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "gemma2": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}),
    "gpt_neox": ("GPTNeoX", {}),
    "phi": ("Phi", {}),
    "opt": ("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}


@pytest.fixture(scope="session")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture
def make(tmp_path: Path, tokenized: Path) -> Callable[..., Path]:
    """A function that writes a tiny model of a kind of `KINDS`, or "bert", and returns its directory."""

    def write(kind: str = "llama", dtype: torch.dtype = torch.bfloat16, name: str = "model", **changes: Any) -> Path:
        torch.manual_seed(0)
        directory = tmp_path / name
        if kind == "bert":
            config = transformers.BertConfig(**{**SMALL, **changes})
            model = transformers.BertModel(config)
        else:
            prefix, settings = KINDS[kind]
            config = getattr(transformers, f"{prefix}Config")(**{**SMALL, **settings, **changes})
            model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        model.to(dtype).save_pretrained(directory)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (directory / file).write_bytes((tokenized / file).read_bytes())
        return directory

    return write


@pytest.fixture
def text() -> list[str]:
    return [TEXT]
