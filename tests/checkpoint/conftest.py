"""Tiny checkpoints: a Llama whose inner sizes are multiples of every block size used here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")


def llama(dtype: torch.dtype = torch.bfloat16, tied: bool = False, seed: int = 0, **changes: Any) -> Any:
    """A Llama of 2 layers and 64 hidden units with random weights, norms included."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a tiny Llama checkpoint and returns its directory."""

    def write(name: str = "model", max_shard_size: str = "5GB", **settings: Any) -> Path:
        directory = tmp_path / name
        llama(**settings).save_pretrained(directory, max_shard_size=max_shard_size)
        (directory / "tokenizer_config.json").write_text('{"model_max_length": 64}')
        (directory / "chat_template.jinja").write_text("{{ messages }}")
        return directory

    return write


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.arange(40).reshape(2, 20)
