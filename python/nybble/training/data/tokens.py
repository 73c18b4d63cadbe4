"""Text to token ids: one stream of them, as perplexity is measured on, or many texts at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .read import read_documents

Data = str | Path | Sequence[Any] | Tensor
"""A text, JSONL, JSON or directory path; a list of texts or dicts; token ids, or a list of documents of them."""
_TEXTS_AT_ONCE = 1024


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of every text without special tokens; a fast tokenizer is given many at once."""
    if tokenizer is None:
        raise ValueError("tokenizer is needed to turn text into tokens; give one, or give data as token ids")
    if not getattr(tokenizer, "is_fast", False):
        return [list(tokenizer.encode(text, add_special_tokens=False, **_quiet(tokenizer))) for text in texts]
    found: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = list(texts[start : start + _TEXTS_AT_ONCE])
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        # Some tokenizer.json files have truncation and padding switched on; these turn both off.
        found += tokenizer(part, truncation=False, padding=False, **options)["input_ids"]
    return found


def _quiet(tokenizer: Any) -> dict[str, Any]:
    """transformers logs a warning for texts longer than the model's context; here they are cut into rows anyway."""
    return {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}


def opening_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of every text by itself: [bos_token_id], or nothing."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return []
    first = list(tokenizer.encode("a", **_quiet(tokenizer)))[:1]
    return [bos] if first == [bos] else []


def tokenize(documents: Iterable[str], tokenizer: Any) -> Tensor:
    """int64 [tokens]: every document's tokens followed by the tokenizer's eos_token_id. Empty documents are left out.

    `tokenizer` has encode(text, add_special_tokens=False) -> ids and eos_token_id, as transformers' have.
    """
    eos = getattr(tokenizer, "eos_token_id", None)
    tokens: list[int] = []
    for ids in encode_all(tokenizer, list(documents)):
        if ids:
            tokens.extend(ids)
            if eos is not None:
                tokens.append(eos)
    return torch.tensor(tokens, dtype=torch.int64)


def to_tokens(data: Data, tokenizer: Any = None, name: str = "data") -> Tensor:
    """Texts or token ids as int64 [tokens], end to end. Raises ValueError when there is nothing in it."""
    if isinstance(data, str | Path):
        tokens = tokenize(read_documents(data), tokenizer)
    elif isinstance(data, Tensor):
        tokens = check_ids(data, name)
    elif not isinstance(data, Sequence):
        raise TypeError(f"{name} must be a path, a list of strings, or token ids, got {type(data).__name__}")
    elif len(data) == 0:
        tokens = torch.empty(0, dtype=torch.int64)
    elif all(isinstance(item, str) for item in data):
        tokens = tokenize(data, tokenizer)
    elif all(isinstance(item, int) for item in data):
        tokens = torch.tensor(data, dtype=torch.int64)
    else:
        kinds = sorted({type(item).__name__ for item in data})
        raise TypeError(f"{name} must be a list of strings or a list of token ids, got items of {', '.join(kinds)}")
    if tokens.numel() == 0:
        raise ValueError(f"{name} is empty: no tokens came out of it")
    return tokens


def check_ids(ids: Tensor, name: str) -> Tensor:
    """int64 [tokens] on the CPU. Raises ValueError when `ids` are not token ids."""
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} as a tensor must be token ids: integers [tokens], got {ids.dtype} {list(ids.shape)}")
    return ids.to("cpu", torch.int64)
