"""Text to packed sequences: documents are joined with the end-of-text token and cut into rows of seq_len + 1 tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Data = str | Path | Sequence[str] | Sequence[int] | Tensor
"""A text, JSONL or directory path; a list of documents; or token ids, already packed end to end."""


def read_documents(path: str | Path) -> list[str]:
    """The documents of a file or directory.

    *.jsonl: one object a line, its "text" is a document. Any other file: the whole file is one document (UTF-8).
    A directory: its *.txt and *.jsonl files in the order of their names.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".txt", ".jsonl"))
        if not files:
            raise FileNotFoundError(f"{path}: no .txt or .jsonl file in this directory")
        return [document for file in files for document in read_documents(file)]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (data must be a text file, a .jsonl file or a directory)")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    return _jsonl_texts(path, text) if path.suffix == ".jsonl" else [text]


def _jsonl_texts(path: Path, content: str) -> list[str]:
    documents = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f'{path}, line {number}: expected an object with a string "text", got {line[:80]!r}')
        documents.append(row["text"])
    return documents


def tokenize(documents: Iterable[str], tokenizer: Any) -> Tensor:
    """int64 [tokens]: every document's tokens followed by the tokenizer's eos_token_id. Empty documents are left out.

    `tokenizer` has encode(text, add_special_tokens=False) -> ids and eos_token_id, as transformers' have.
    """
    if tokenizer is None:
        raise ValueError("tokenizer is needed to turn text into tokens; give one, or give data as token ids")
    eos = getattr(tokenizer, "eos_token_id", None)
    # transformers logs a warning for texts longer than the model's context; here they are cut into rows anyway.
    quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
    tokens: list[int] = []
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False, **quiet)
        if ids:
            tokens.extend(ids)
            if eos is not None:
                tokens.append(eos)
    return torch.tensor(tokens, dtype=torch.int64)


def to_tokens(data: Data, tokenizer: Any = None, name: str = "data") -> Tensor:
    """Any form of `Data` as int64 [tokens]. Raises ValueError when there is nothing in it."""
    if isinstance(data, str | Path):
        tokens = tokenize(read_documents(data), tokenizer)
    elif isinstance(data, Tensor):
        tokens = _check_ids(data, name)
    elif not isinstance(data, Sequence):
        raise TypeError(f"{name} must be a path, a list of strings, or token ids, got {type(data).__name__}")
    elif len(data) == 0:
        tokens = torch.empty(0, dtype=torch.int64)
    elif all(isinstance(item, str) for item in data):
        tokens = tokenize(data, tokenizer)  # type: ignore[arg-type]  # checked in the line above
    elif all(isinstance(item, int) for item in data):
        tokens = torch.tensor(data, dtype=torch.int64)
    else:
        kinds = sorted({type(item).__name__ for item in data})
        raise TypeError(f"{name} must be a list of strings or a list of token ids, got items of {', '.join(kinds)}")
    if tokens.numel() == 0:
        raise ValueError(f"{name} is empty: no tokens came out of it")
    return tokens


def _check_ids(ids: Tensor, name: str) -> Tensor:
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} as a tensor must be token ids: integers [tokens], got {ids.dtype} {list(ids.shape)}")
    return ids.to("cpu", torch.int64)


def pack(tokens: Tensor, seq_len: int, name: str = "data") -> Tensor:
    """int64 [rows, seq_len + 1]: row i holds tokens i * seq_len to (i + 1) * seq_len, both included.

    Neighbouring rows share one token, the last target of one and the first input of the next, so every token but the
    first is predicted exactly once. Fewer than seq_len tokens are left over at the end. Documents in one row see each
    other across the end-of-text token.
    """
    rows = (tokens.numel() - 1) // seq_len
    if rows < 1:
        raise ValueError(
            f"{name} has {tokens.numel()} tokens, fewer than one sequence needs (seq_len + 1 = {seq_len + 1}); "
            "give more text or a smaller seq_len"
        )
    return tokens[: rows * seq_len + 1].unfold(0, seq_len + 1, seq_len)


def split(rows: Tensor, val_fraction: float) -> tuple[Tensor, Tensor | None]:
    """(training rows, held-out rows or None). The held-out rows are the last ones: at most one document is in both."""
    if val_fraction == 0:
        return rows, None
    held_out = max(1, round(rows.shape[0] * val_fraction))
    if held_out >= rows.shape[0]:
        raise ValueError(f"val_fraction={val_fraction} of {rows.shape[0]} sequences leaves none to train on")
    return rows[:-held_out], rows[-held_out:]


@dataclass(frozen=True)
class Batches:
    """The endless stream of training sequences: a new permutation each epoch, a function of (seed, position) alone.

    Position, not batch, decides what a sequence is, so batch_size and grad_accum only group the same stream.
    """

    rows: Tensor
    seed: int

    def at(self, position: int, count: int) -> Tensor:
        """Sequences number position to position + count - 1 of the stream: [count, seq_len + 1]."""
        return torch.stack([self.rows[self._index(p)] for p in range(position, position + count)])

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.rows.shape[0])
        return int(_permutation(self.rows.shape[0], self.seed, epoch)[offset])


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(count, generator=generator)
