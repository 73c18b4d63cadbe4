"""Documents into rows of seq_len tokens: as one stream, whole and kept apart, or one a row."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .examples import Examples, make_examples
from .rows import IGNORE, PADDING, Rows
from .tokens import Data

PACKINGS = ("stream", "documents", "none")


@dataclass(frozen=True)
class DataReport:
    """What became of the data.

    Attributes:
        documents: documents (or conversations, prompts with answers) that are trained on, in whole or in part.
        tokens: their tokens. predicted: targets that count, in one pass over the rows.
        rows: rows of seq_len tokens. padding: share of their places that hold nothing.
        continued: texts longer than a row, which go on in others.
        cut: conversations and prompts with answers that lost their end, being longer than a row.
        dropped: records left out, because nothing (or nothing that fits in a row) is predicted in them.
        left_over: tokens of the stream at its end, fewer than a row, or in rows in which nothing is predicted.
    """

    documents: int
    tokens: int
    predicted: int
    rows: int
    padding: float = 0.0
    continued: int = 0
    cut: int = 0
    dropped: int = 0
    left_over: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        text = (
            f"{self.documents:,} documents, {self.tokens:,} tokens ({self.predicted:,} predicted), {self.rows:,} rows"
        )
        text += f", {self.padding:.1%} padding" if self.padding else ""
        for count, what in (
            (self.continued, "longer than a row and continued"),
            (self.cut, "cut to a row"),
            (self.dropped, "left out, nothing to predict"),
        ):
            text += f"; {count:,} {what}" if count else ""
        return text


def make_rows(
    data: Data,
    seq_len: int,
    packing: str = "stream",
    tokenizer: Any = None,
    val_fraction: float = 0.0,
    name: str = "data",
) -> tuple[Rows, Rows | None, DataReport]:
    """(training rows, held-out rows or None, what became of the data): `make_examples`, `pack` and `split` in one.

    Held out are the last val_fraction of the rows, or of the documents before they are packed into rows.
    """
    examples = make_examples(data, tokenizer, name)
    if packing == "stream" or not val_fraction:
        rows, report = pack(examples, seq_len, packing, name)
        return *split(rows, val_fraction), report
    pieces, report = _pieces(examples, seq_len, name)
    train, held_out = pieces.divide(val_fraction)
    rows = _lay_out(examples, train, seq_len, packing)
    return rows, _lay_out(examples, held_out, seq_len, packing), _finish(report, rows, int(train.length.sum()))


def pack(examples: Examples, seq_len: int, packing: str = "stream", name: str = "data") -> tuple[Rows, DataReport]:
    """Documents as rows [n, seq_len].

    packing:
        "stream": joined end to end and cut. Rows share one token with their neighbours, the last target of one and the
            first input of the next, so every token but the first is predicted once. Documents of a row see each other.
        "documents": whole documents, as many as fit into a row, which do not see each other: attention is causal within
            each, positions restart. A document's first token has nothing before it and is not predicted.
        "none": one document a row, padded at the right to the longest.

    A text longer than a row goes on in the next as a document of its own, its first token being the one before's last
    target. A conversation, or a prompt with its answer, is cut to a row from its end. Rows in which nothing is
    predicted are left out. The result is a function of the arguments alone.

    Raises:
        ValueError: packing or seq_len is not allowed, or there is not one row.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing must be one of {', '.join(map(repr, PACKINGS))}, got {packing!r}")
    if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 1:
        raise ValueError(f"seq_len must be an integer of at least 1, got {seq_len!r}")
    if packing == "stream":
        return _pack_stream(examples, seq_len, name)
    pieces, report = _pieces(examples, seq_len, name)
    rows = _lay_out(examples, pieces, seq_len, packing)
    return rows, _finish(report, rows, int(pieces.length.sum()))


def split(rows: Rows, val_fraction: float) -> tuple[Rows, Rows | None]:
    """(training rows, held-out rows or None). The held-out rows are the last ones."""
    if val_fraction == 0:
        return rows, None
    held_out = _held_out(len(rows), val_fraction)
    return rows.part(0, len(rows) - held_out), rows.part(len(rows) - held_out, len(rows))


def _held_out(count: int, val_fraction: float) -> int:
    held_out = max(1, round(count * val_fraction))
    if held_out >= count:
        raise ValueError(f"val_fraction={val_fraction} of {count} sequences leaves none to train on")
    return held_out


def _pack_stream(examples: Examples, seq_len: int, name: str) -> tuple[Rows, DataReport]:
    tokens = len(examples.ids)
    count = (tokens - 1) // seq_len
    if count < 1:
        raise ValueError(
            f"{name} has {tokens} tokens, fewer than one sequence needs (seq_len + 1 = {seq_len + 1}); "
            "give more text or a smaller seq_len"
        )
    used = count * seq_len
    ids = examples.ids[:used].view(count, seq_len)
    targets = examples.ids[1 : used + 1].where(examples.predicted[1 : used + 1], IGNORE).view(count, seq_len)
    counted = (targets != IGNORE).any(1)
    if not counted.all():
        ids, targets = ids[counted], targets[counted]
    if not len(ids):
        raise ValueError(f"{name}: nothing is predicted in any of its rows")
    rows = Rows(ids, targets)
    left_over = tokens - 1 - ids.numel()
    report = DataReport(len(examples), tokens, 0, 0, dropped=examples.dropped, left_over=left_over)
    return rows, _finish(report, rows, rows.ids.numel())


def _finish(report: DataReport, rows: Rows, filled: int) -> DataReport:
    """With what is known of the finished rows, in which `filled` places hold a token."""
    known = {"rows": len(rows), "predicted": int(rows.counted.sum()), "padding": 1 - filled / rows.ids.numel()}
    return DataReport(**{**asdict(report), **known})


class _Pieces(NamedTuple):
    """What goes into a row as a whole: int64 [n], the first input token's index in the examples, and how many."""

    start: Tensor
    length: Tensor

    def divide(self, val_fraction: float) -> tuple[_Pieces, _Pieces]:
        """(the first ones, the last val_fraction of them)."""
        first = len(self.start) - _held_out(len(self.start), val_fraction)
        return _Pieces(self.start[:first], self.length[:first]), _Pieces(self.start[first:], self.length[first:])


def _pieces(examples: Examples, seq_len: int, name: str) -> tuple[_Pieces, DataReport]:
    """Documents cut to what fits into a row; a document of n tokens has n - 1 inputs."""
    inputs = examples.starts.diff() - 1
    cut = ~examples.divisible & (inputs > seq_len)
    kept_inputs = torch.where(cut, seq_len, inputs)
    parts = (kept_inputs + seq_len - 1) // seq_len  # 0 for a document of a single token
    within = torch.arange(int(parts.sum())) - (parts.cumsum(0) - parts).repeat_interleave(parts)
    start = examples.starts[:-1].repeat_interleave(parts) + within * seq_len
    length = (kept_inputs.repeat_interleave(parts) - within * seq_len).clamp(max=seq_len)
    predicted_before = torch.cat([torch.zeros(1, dtype=torch.int64), examples.predicted.cumsum(0)])
    counted = predicted_before[start + length + 1] - predicted_before[start + 1] > 0
    document = torch.arange(len(examples)).repeat_interleave(parts)[counted]
    if not counted.any():
        raise ValueError(f"{name}: nothing is predicted in its first {seq_len} tokens of any document")
    trained = torch.zeros(len(examples), dtype=torch.bool)
    trained[document] = True
    report = DataReport(
        documents=int(trained.sum()),
        tokens=int((kept_inputs + 1)[trained].sum()),
        predicted=0,
        rows=0,
        continued=int((trained & (parts > 1)).sum()),
        cut=int((trained & cut).sum()),
        dropped=examples.dropped + int((~trained).sum()),
    )
    return _Pieces(start[counted], length[counted]), report


def _lay_out(examples: Examples, pieces: _Pieces, seq_len: int, packing: str) -> Rows:
    """The pieces in their rows, in the order in which they come in the data."""
    count = len(pieces.start)
    if packing == "none":
        seq_len = int(pieces.length.max())
    members = best_fit(pieces.length.tolist(), seq_len) if packing == "documents" else [[i] for i in range(count)]
    order = torch.tensor([piece for row in members for piece in row])
    sizes = torch.tensor([len(row) for row in members])
    row = torch.arange(len(members)).repeat_interleave(sizes)
    document = torch.arange(count) - (sizes.cumsum(0) - sizes)[row]
    start, length = pieces.start[order], pieces.length[order]
    ahead = length.cumsum(0) - length  # inputs of all pieces before
    first = ahead[(sizes.cumsum(0) - sizes)][row]
    column = ahead - first

    position = torch.arange(int(length.sum())) - ahead.repeat_interleave(length)
    source = start.repeat_interleave(length) + position
    place = (row * seq_len + column).repeat_interleave(length) + position

    def laid_out(values: Tensor, empty: int) -> Tensor:
        rows = torch.full((len(members) * seq_len,), empty, dtype=torch.int32)
        rows[place] = values.to(torch.int32)
        return rows.view(len(members), seq_len)

    targets = examples.ids[source + 1].where(examples.predicted[source + 1], IGNORE)
    ids, targets = laid_out(examples.ids[source], 0), laid_out(targets, IGNORE)
    if len(members) == count:
        return Rows(ids, targets)
    return Rows(
        ids,
        targets,
        laid_out(position, 0),
        laid_out(document.repeat_interleave(length), PADDING),
    )


def best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Items into bins of `capacity`: the largest first, each into the fullest bin that has room (best fit decreasing).

    Needs at most 11/9 of the fewest possible bins, and four (D. S. Johnson, 1974). Sizes are from 1 to capacity. Bins
    are in the order of their first items, and so are the items of a bin. Near-linear: which amounts of room some bin
    has is one integer's bits, so the fullest fitting bin is its lowest set bit from the item's size on.
    """
    order = sorted(range(len(sizes)), key=lambda item: (-sizes[item], item))
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for item in order:
        size = sizes[item]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        if left := room - size:
            by_room[left].append(number)
            rooms |= 1 << left
    for members in bins:
        members.sort()
    return sorted(bins)
