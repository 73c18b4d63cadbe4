"""Texts with labels, for classification."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batches import stream_indices
from .read import read_records, shown

Label = str | int


class LabelledText(NamedTuple):
    """A text, or a pair of texts, and its label; `where` it stands."""

    where: str
    text: str
    pair: str | None
    label: Label


def read_labelled(data: str | Path | Sequence[Any], name: str = "data") -> list[LabelledText]:
    """Rows {"text", "label"} or {"text", "text_pair", "label"} of a file, directory or list, or pairs (text, label).

    Raises:
        FileNotFoundError, TypeError, ValueError: naming file, line and field, what came and what is allowed.
    """
    if not isinstance(data, str | Path):
        rows = [
            {"text": row[0], "label": row[1]} if isinstance(row, tuple | list) and len(row) == 2 else row
            for row in data
        ]
        return [_labelled(where, row) for where, row in read_records(rows, name)]
    return [_labelled(where, row) for where, row in read_records(data, name)]


def _labelled(where: str, row: Any) -> LabelledText:
    if not isinstance(row, dict) or "text" not in row or "label" not in row:
        raise ValueError(f"{where}: expected an object with text and label, got {shown(row)}")
    text, pair, label = row["text"], row.get("text_pair"), row["label"]
    if not isinstance(text, str):
        raise ValueError(f"{where}: text must be a string, got {shown(text)}")
    if pair is not None and not isinstance(pair, str):
        raise ValueError(f"{where}: text_pair must be a string, got {shown(pair)}")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(f"{where}: label must be a string or an integer, got {shown(label)}")
    return LabelledText(where, text, pair, label)


def label_names(rows: Iterable[LabelledText]) -> tuple[Label, ...]:
    """The labels that occur, in order: the class of a label is its place here, whatever the order of the rows.

    Raises:
        ValueError: some are strings and some integers.
    """
    found = {row.label for row in rows}
    if len({type(label) for label in found}) > 1:
        raise ValueError("labels are partly strings and partly integers; one kind is needed")
    return tuple(sorted(found))


@dataclass(frozen=True)
class LabelledBatch:
    """Texts and their classes.

    Attributes:
        ids: int64 [B, T], padded at the right to the longest text. mask: bool [B, T], False in the padding.
        labels: int64 [B], the classes. types: int64 [B, T], 1 in the second text of a pair; None without pairs.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    types: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> LabelledBatch:
        """The same batch on a device."""
        types = None if self.types is None else self.types.to(device)
        return LabelledBatch(self.ids.to(device), self.mask.to(device), self.labels.to(device), types)

    def part(self, start: int, stop: int) -> LabelledBatch:
        """Texts number start to stop - 1, padded as they are."""
        types = None if self.types is None else self.types[start:stop]
        return LabelledBatch(self.ids[start:stop], self.mask[start:stop], self.labels[start:stop], types)


@dataclass(frozen=True)
class Labelled:
    """Tokens of texts with their classes, and the endless stream of them, a function of (seed, position) alone.

    Attributes:
        ids: int32 [tokens], the texts end to end. types: int8 [tokens], the part of a pair; None without pairs.
        starts: int64 [n + 1], where each begins. labels: int64 [n], classes.
        names: the label of every class. pad: the id that stands in padding. seed: the order.
        cut: texts that lost their end, being longer than max_length.
    """

    ids: Tensor
    starts: Tensor
    labels: Tensor
    names: tuple[Label, ...]
    pad: int = 0
    types: Tensor | None = None
    seed: int = 0
    cut: int = 0

    @staticmethod
    def read(
        data: str | Path | Sequence[Any],
        tokenizer: Any,
        max_length: int,
        names: Sequence[Label] | None = None,
        seed: int = 0,
        name: str = "data",
    ) -> Labelled:
        """Labelled texts as tokens, with the tokenizer's special tokens; longer ones are cut at their end.

        names: the label of every class, such as those of the training data for held-out data; by default the labels
        that occur, in order.

        Raises:
            FileNotFoundError, TypeError, ValueError: data that is something else, or a label that is not in `names`.
        """
        rows = read_labelled(data, name)
        if not rows:
            raise ValueError(f"{name} is empty: there is no row in it")
        names = label_names(rows) if names is None else tuple(names)
        number = {label: i for i, label in enumerate(names)}
        for row in rows:
            if row.label not in number:
                known = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
                raise ValueError(f"{row.where}: label {row.label!r} is none of the {len(names)} classes: {known}")
        ids, types, cut = _encode(rows, tokenizer, max_length)
        lengths = torch.tensor([0, *map(len, ids)])
        pad = getattr(tokenizer, "pad_token_id", None)
        return Labelled(
            torch.tensor([i for text in ids for i in text], dtype=torch.int32),
            lengths.cumsum(0),
            torch.tensor([number[row.label] for row in rows]),
            names,
            0 if pad is None else pad,
            None if types is None else torch.tensor([i for text in types for i in text], dtype=torch.int8),
            seed,
            cut,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, position: int, count: int) -> LabelledBatch:
        """Texts number position to position + count - 1 of the stream: a new permutation each epoch."""
        return self.take(stream_indices(len(self), self.seed, position, count))

    def take(self, indices: Sequence[int] | Tensor) -> LabelledBatch:
        """The texts of these numbers."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        start, length = self.starts[index], self.starts.diff()[index]
        place = torch.arange(max(1, int(length.max())))
        mask = place < length[:, None]
        source = (start[:, None] + place)[mask]
        ids = torch.full(mask.shape, self.pad)
        ids[mask] = self.ids[source].to(torch.int64)
        if self.types is None:
            return LabelledBatch(ids, mask, self.labels[index])
        types = torch.zeros_like(ids)
        types[mask] = self.types[source].to(torch.int64)
        return LabelledBatch(ids, mask, self.labels[index], types)

    def part(self, start: int, stop: int) -> Labelled:
        """Texts number start to stop - 1."""
        first, last = int(self.starts[start]), int(self.starts[stop])
        return Labelled(
            self.ids[first:last],
            self.starts[start : stop + 1] - first,
            self.labels[start:stop],
            self.names,
            self.pad,
            None if self.types is None else self.types[first:last],
            self.seed,
        )

    def split(self, val_fraction: float) -> tuple[Labelled, Labelled | None]:
        """(the first, the last val_fraction of the texts or None). Shuffle data that is sorted by label before."""
        if val_fraction == 0:
            return self, None
        first = len(self) - max(1, round(len(self) * val_fraction))
        if first < 1:
            raise ValueError(f"val_fraction={val_fraction} of {len(self)} texts leaves none to train on")
        return self.part(0, first), self.part(first, len(self))

    def tensors(self) -> list[Tensor]:
        """All that the data consists of."""
        return [self.ids, self.starts, self.labels, *([] if self.types is None else [self.types])]


def _encode(
    rows: list[LabelledText], tokenizer: Any, max_length: int
) -> tuple[list[list[int]], list[list[int]] | None, int]:
    """(token ids of each row, part of the pair of each token or None, how many rows were cut)."""
    if tokenizer is None:
        raise ValueError("tokenizer is needed to turn text into tokens")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length must be an integer of at least 1, got {max_length!r}")
    paired = any(row.pair is not None for row in rows)
    if not callable(tokenizer):
        if paired:
            raise ValueError(f"text_pair needs a transformers tokenizer, got {type(tokenizer).__name__}")
        whole = [list(tokenizer.encode(row.text)) for row in rows]
        return [ids[:max_length] for ids in whole], None, sum(len(ids) > max_length for ids in whole)
    ids: list[list[int]] = []
    types: list[list[int]] = []
    options = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    limits = {"max_length": max_length, "truncation": True}
    cut = 0
    for row in rows:
        pair = (row.text,) if row.pair is None else (row.text, row.pair)
        found = tokenizer(*pair, **options, return_token_type_ids=paired)
        if len(found["input_ids"]) > max_length:
            cut += 1
            found = tokenizer(*pair, **{**options, **limits}, return_token_type_ids=paired)
        ids.append(found["input_ids"])
        types.append(found["token_type_ids"] if paired else [])
    return ids, types if paired else None, cut
