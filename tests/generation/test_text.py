"""Streams of text: pieces joined are the text, no character is split, stop strings never show."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tiny import ByteTokenizer

from nybble.generation.text import TextStream

_texts = st.text(alphabet=st.sampled_from("ab é😀\n"), max_size=30)
_stops = st.lists(st.text(alphabet=st.sampled_from("ab é"), min_size=1, max_size=4), max_size=3)


def pieces(text: str, stop: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(ByteTokenizer(), stop)
    given_out = []
    for byte in text.encode():
        given_out.append(stream.push(byte))
        if stream.stopped is not None:
            break
    given_out.append(stream.finish())
    return given_out, stream


@given(text=_texts, stop=_stops)
def test_joined_pieces_are_the_text_up_to_the_first_stop_string(text: str, stop: list[str]) -> None:
    found, stream = pieces(text, stop)
    ends = [text.find(s) for s in stop if s in text]
    # What ends first stops the answer; of those that begin there the one that is complete first.
    if ends:
        first = min(range(len(text)), key=lambda i: (not any(text[: i + 1].endswith(s) for s in stop), i))
        begins = [text[: first + 1].find(s) for s in stop if s in text[: first + 1]]
        assert "".join(found) == text[: min(begins)] and stream.stopped in stop
    else:
        assert "".join(found) == text and stream.stopped is None
    assert stream.text == "".join(found)
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in found)


@given(text=_texts, stop=_stops)
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(text: str, stop: list[str]) -> None:
    stream = TextStream(ByteTokenizer(), stop)
    out = ""
    for end, character in enumerate(text, 1):
        for byte in character.encode():
            out += stream.push(byte)
        if stream.stopped is not None:
            return
        held = text[len(out) : end]
        assert text[:end].startswith(out)
        assert not held or any(s.startswith(held) and s != held for s in stop)


def test_bytes_that_are_no_text_come_out_at_the_end() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.push(b) for b in (0x61, 0xC3)] == ["a", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.text == "a\N{REPLACEMENT CHARACTER}"
