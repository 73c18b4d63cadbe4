"""From tokens to text, a piece at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing list of tokens, in pieces that can be shown at once.

    A piece never splits a character, and what may be the beginning of a stop string is held back until it is known.
    Joined, the pieces are the text; the stop string and what follows it is not.

    Attributes:
        tokens: so far. text: that was given out. stopped: the stop string that was found, or None.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.tokens: list[int] = []
        self.text = ""
        self.stopped: str | None = None
        self._held = ""  # decoded, not given out
        self._begin = 0  # tokens from here on are decoded again: a decoder may treat a text's beginning differently
        self._read = 0  # tokens whose text is decoded

    def push(self, token: int) -> str:
        """What can be shown after one more token; may be empty."""
        self.tokens.append(token)
        before = self._decode(self.tokens[self._begin : self._read])
        now = self._decode(self.tokens[self._begin :])
        if now.endswith(_REPLACEMENT) or len(now) <= len(before):
            return ""  # half a character, or nothing yet
        self._held += now[len(before) :]
        self._begin, self._read = self._read, len(self.tokens)
        return self._release(last=False)

    def finish(self) -> str:
        """What was held back, at the end; empty after a stop string."""
        if self.stopped is not None:
            return ""
        before = self._decode(self.tokens[self._begin : self._read])
        self._held += self._decode(self.tokens[self._begin :])[len(before) :]
        self._read = len(self.tokens)
        return self._release(last=True)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""

    def _release(self, last: bool) -> str:
        found = [(place, text) for text in self.stop if (place := self._held.find(text)) >= 0]
        if found:
            place, self.stopped = min(found, key=lambda pair: (pair[0], -len(pair[1])))
        else:
            place = len(self._held) - (0 if last else self._undecided())
        piece, self._held = self._held[:place], self._held[place:]
        self.text += piece
        return piece

    def _undecided(self) -> int:
        """Characters at the end of what is held that may begin a stop string."""
        longest = 0
        for text in self.stop:
            for size in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:size]):
                    longest = size
                    break
        return longest
