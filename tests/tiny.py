"""A Llama of 2 layers and 64 hidden units over bytes, its tokenizer, and a text: training in seconds, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

SENTENCES = (
    "the small model reads the same few words again and again.",
    "a nybble is four bits, and two of them make one byte.",
    "every document ends where the next one begins.",
)
TEXT = " ".join(SENTENCES[i % 3] for i in range(60))
CONTEXT = 128
# Of the model, by the names that the configurations of decoders have in common.
SETTINGS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


class ByteTokenizer:
    """Bytes as tokens; byte 0 ends a document."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return bytes(int(i) for i in ids if i or not skip_special_tokens).decode(errors="replace")


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random LlamaForCausalLM with a vocabulary of 256 and a context of 128 tokens."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SETTINGS, **changes})).to(dtype).eval()


def write_model(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny Llama and a byte-level tokenizer.json of 256 tokens; returns the directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model = llama(dtype)
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = alphabet.pop()  # a byte that UTF-8 never has
    vocabulary = {"<end>": 0, **{character: i for i, character in enumerate(alphabet, 1)}}
    assert len(vocabulary) == 256 and end not in vocabulary
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<end>"}'
    )
    return directory
