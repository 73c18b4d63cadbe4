"""Examples: tokens of documents and which of them are predicted, out of any form of data."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .chat import ChatTemplate, check_messages, from_sharegpt
from .drafts import Draft, Encoded, Encoder
from .read import Record, read_records, shown
from .tokens import Data, check_ids

_RECORDS_AT_ONCE = 1024


@dataclass(frozen=True)
class Examples:
    """Documents end to end.

    Attributes:
        ids: int32 [tokens]. predicted: bool [tokens], the tokens that a model is to learn to write.
        starts: int64 [documents + 1], where each begins in `ids`, and the end.
        divisible: bool [documents]: text, of which a long one goes on in another row, not a prompt with its answer.
        dropped: records of which no token is predicted, and which are therefore left out.
    """

    ids: Tensor
    predicted: Tensor
    starts: Tensor
    divisible: Tensor
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.divisible)

    def __getitem__(self, index: int) -> tuple[list[int], list[bool]]:
        """(ids, predicted) of one document."""
        span = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.ids[span].tolist(), self.predicted[span].tolist()


def make_examples(data: Data, tokenizer: Any = None, name: str = "data") -> Examples:
    """Any form of `Data` as documents with what is to be predicted in them.

    Texts begin with the token that the tokenizer puts in front by itself, if any, and end with its eos_token_id; all
    their tokens are predicted. Token ids are taken as they are. Rows of JSONL, JSON or a list of dicts may be of
    several kinds: each says by its fields what it is, the first of these that it has, and other fields are ignored.

        {"messages": [{"role", "content"}, ...], "tools": optional}   the tokenizer's chat template; the assistant's
        {"conversations": [{"from", "value"}, ...]}                    answers are predicted (see `ChatTemplate`)
        {"prompt", "completion"}                                      the completion is predicted, and the end of text
        {"instruction", "input": optional, "output"}                  as a conversation, where the tokenizer has a chat
                                                                      template, else as a prompt with headings
        {"text"}

    Raises:
        FileNotFoundError, TypeError, ValueError: naming file, line and field, what came and what is allowed; or there
            is nothing to predict.
    """
    builder = _Builder()
    if isinstance(data, Tensor):
        builder.add_tokens(check_ids(data, name).tolist())
    elif not isinstance(data, str | Path | Sequence):
        raise TypeError(f"{name} must be a path, a list of texts or dicts, or token ids, got {type(data).__name__}")
    elif not isinstance(data, str | Path) and len(data) and not isinstance(data[0], str | dict):
        _add_ids(builder, data, name)
    else:
        _add_records(builder, read_records(data, name), tokenizer)
    return builder.done(name)


def _add_ids(builder: _Builder, data: Sequence[Any], name: str) -> None:
    """Token ids, or documents of them."""
    if all(isinstance(item, int) and not isinstance(item, bool) for item in data):
        builder.add_tokens(list(data))
        return
    for number, item in enumerate(data):
        where = f"{name}[{number}]"
        if isinstance(item, Tensor):
            builder.add_tokens(check_ids(item, where).tolist())
        elif isinstance(item, Sequence) and not isinstance(item, str) and all(type(i) is int for i in item):
            builder.add_tokens(list(item))
        else:
            kinds = sorted({type(item).__name__ for item in data})
            raise TypeError(
                f"{name} must be a list of texts or dicts, of token ids, or of lists of token ids, got items of "
                f"{', '.join(kinds)}"
            )


def _add_records(builder: _Builder, records: Iterator[Record], tokenizer: Any) -> None:
    reader = _RecordReader(tokenizer)
    encoder = Encoder(tokenizer)
    while part := list(islice(records, _RECORDS_AT_ONCE)):
        made = [reader.drafts(record) for record in part]
        encoded = encoder.encode([draft for drafts in made for draft in drafts if isinstance(draft, Draft)])
        for drafts in made:
            builder.add([next(encoded) if isinstance(draft, Draft) else draft for draft in drafts])


class _RecordReader:
    """What a record's fields mean."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._template: ChatTemplate | None = None

    def drafts(self, record: Record) -> list[Draft | Encoded]:
        where, row = record
        if isinstance(row, str):
            return [Draft(row, None, bare=False)]
        if "messages" in row:
            return self._chat(check_messages(row["messages"], where), where, row.get("tools"))
        if "conversations" in row:
            return self._chat(from_sharegpt(row["conversations"], where), where, row.get("tools"))
        if "prompt" in row and "completion" in row:
            return _prompt(_string(row, "prompt", where), _string(row, "completion", where))
        if "instruction" in row and "output" in row:
            return self._instruction(row, where)
        if "text" in row:
            return [Draft(_string(row, "text", where), None, bare=False)]
        raise ValueError(
            f"{where}: expected an object with text; prompt and completion; messages; conversations; or instruction "
            f"and output; its fields are {', '.join(map(str, row)) or 'none'}"
        )

    def _chat(self, messages: list[dict[str, Any]], where: str, tools: Any) -> list[Draft | Encoded]:
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer, where)
        return self._template.drafts(messages, where, tools)

    def _instruction(self, row: dict[str, Any], where: str) -> list[Draft | Encoded]:
        instruction, output = _string(row, "instruction", where), _string(row, "output", where)
        given = _string(row, "input", where) if row.get("input") is not None else ""
        if getattr(self.tokenizer, "chat_template", None):
            question = f"{instruction}\n\n{given}" if given else instruction
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
            return self._chat(turns, where, None)
        headings = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
        return _prompt(f"{headings}### Response:\n", output)


def _prompt(prompt: str, completion: str) -> list[Draft | Encoded]:
    text = prompt + completion
    return [Draft(text, ((len(prompt), len(text)),), bare=False)]


def _string(row: dict[str, Any], field: str, where: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field} must be a string, got {shown(value)}")
    return value


class _Builder:
    """Collects documents in flat arrays: a list of tensors would cost more than the tokens."""

    def __init__(self) -> None:
        self.ids = array("i")
        self.predicted = bytearray()
        self.starts = array("q", [0])
        self.divisible = bytearray()
        self.dropped = 0

    def add(self, made: Iterable[Encoded]) -> None:
        """The documents of one record."""
        kept = [encoded for encoded in made if any(encoded.predicted)]
        self.dropped += not kept
        for encoded in kept:
            self.ids.extend(encoded.ids)
            self.predicted.extend(encoded.predicted)
            self.starts.append(len(self.ids))
            self.divisible.append(encoded.divisible)

    def add_tokens(self, ids: list[int]) -> None:
        self.add([Encoded(ids, [True] * len(ids), divisible=True)])

    def done(self, name: str) -> Examples:
        if not self.divisible:
            dropped = f" ({self.dropped} records have no token to predict)" if self.dropped else ""
            raise ValueError(f"{name} is empty: no tokens came out of it{dropped}")
        return Examples(
            torch.frombuffer(self.ids, dtype=torch.int32),
            torch.frombuffer(self.predicted, dtype=torch.bool),
            torch.frombuffer(self.starts, dtype=torch.int64),
            torch.frombuffer(self.divisible, dtype=torch.bool),
            self.dropped,
        )
