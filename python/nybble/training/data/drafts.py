"""Texts in which some parts are to be predicted, and their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from .tokens import encode_all, opening_tokens

_TEXTS_AT_ONCE = 1024


class Draft(NamedTuple):
    """A text before it becomes tokens.

    Attributes:
        text: the whole of it.
        answers: (start, end) of the parts that are predicted, in characters, in order; None: all of it.
        bare: it stands without the tokenizer's own opening and end-of-text tokens, as a chat template's text does.
    """

    text: str
    answers: tuple[tuple[int, int], ...] | None
    bare: bool = True


class Encoded(NamedTuple):
    """Tokens, which of them are predicted, and whether a long one may go on in another row."""

    ids: list[int]
    predicted: list[bool]
    divisible: bool = False


class Encoder:
    """Drafts to tokens.

    The text is encoded as a whole. Where a token would contain both the end of a prompt and the beginning of its
    answer (or the tokenizer does not tell its tokens' places, which only fast ones do), the parts are encoded one by
    one: at inference the prompt is encoded alone, so that token would not be seen there.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos = getattr(tokenizer, "eos_token_id", None)
        self.opening = opening_tokens(tokenizer) if tokenizer is not None else []
        special = set(getattr(tokenizer, "all_special_ids", ()))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = special | {number for number, token in added.items() if token.special}

    def encode(self, drafts: Sequence[Draft]) -> Iterator[Encoded]:
        """The drafts' tokens, in order. A text of no tokens is empty, without even an end-of-text token."""
        for start in range(0, len(drafts), _TEXTS_AT_ONCE):
            part = drafts[start : start + _TEXTS_AT_ONCE]
            plain = iter(encode_all(self.tokenizer, [draft.text for draft in part if draft.answers is None]))
            marked = iter(self._marked([draft for draft in part if draft.answers is not None]))
            for draft in part:
                encoded = next(marked) if draft.answers is not None else _all_predicted(next(plain))
                yield encoded if draft.bare or not encoded.ids else self._framed(encoded)

    def _framed(self, encoded: Encoded) -> Encoded:
        """With the tokenizer's opening token, and the end of the text, which a model must learn to write."""
        ids = [*self.opening, *encoded.ids]
        predicted = [*(encoded.divisible for _ in self.opening), *encoded.predicted]
        if self.eos is not None:
            ids.append(self.eos)
            predicted.append(True)
        return Encoded(ids, predicted, encoded.divisible)

    def _marked(self, drafts: Sequence[Draft]) -> Iterator[Encoded]:
        if not drafts:
            return
        if not getattr(self.tokenizer, "is_fast", False):
            for draft in drafts:
                yield self._part_by_part(draft)
            return
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        texts = [draft.text for draft in drafts]
        found = self.tokenizer(texts, truncation=False, padding=False, return_offsets_mapping=True, **options)
        for draft, ids, places in zip(drafts, found["input_ids"], found["offset_mapping"], strict=True):
            predicted = self._by_place(draft, ids, places)
            yield self._part_by_part(draft) if predicted is None else Encoded(ids, predicted)

    def _by_place(self, draft: Draft, ids: list[int], places: list[tuple[int, int]]) -> list[bool] | None:
        """Which tokens begin within an answer; None where a prompt's end and an answer's beginning are one token."""
        predicted, token = [False] * len(ids), 0
        for start, end in draft.answers or ():
            while token < len(ids) and places[token][0] < start:
                token += 1
            # Tokens of a prompt end where the answer begins. Some tokenizers leave blanks out of a token's place, so a
            # gap before the answer means that its first token may contain the prompt's last blank.
            if start > 0 and (token == 0 or places[token - 1][1] != start):
                return None
            first = token
            while token < len(ids) and places[token][0] < end:
                token += 1
            special = self._last_special(ids[first:token])
            last = token
            if special is not None and not draft.text[places[first + special][1] : end].strip():
                last = first + special + 1
            predicted[first:last] = [True] * (last - first)
        return predicted

    def _part_by_part(self, draft: Draft) -> Encoded:
        """The text cut where answers begin and end, every part encoded by itself."""
        cuts = sorted({0, len(draft.text), *(place for answer in draft.answers or () for place in answer)})
        parts = [draft.text[a:b] for a, b in pairwise(cuts)]
        starts = {answer[0] for answer in draft.answers or ()}
        encoded = Encoded([], [])
        for start, ids in zip(cuts, encode_all(self.tokenizer, parts), strict=False):
            counted = len(ids) if start in starts else 0
            special = self._last_special(ids)
            if counted and special is not None and not self._decode(ids[special + 1 :]).strip():
                counted = special + 1
            encoded.ids.extend(ids)
            encoded.predicted.extend(i < counted for i in range(len(ids)))
        return encoded

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids) if ids else ""

    def _last_special(self, ids: list[int]) -> int | None:
        """Index of the last special token. An answer ends with it if only blanks follow.

        ChatML, for one, writes a line break after the token that ends the turn; no model is asked to go on there.
        """
        return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in self.special), None)


def _all_predicted(ids: list[int]) -> Encoded:
    return Encoded(ids, [True] * len(ids), divisible=True)
