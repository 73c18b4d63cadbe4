"""Packing, shuffling, reading: every token but the first is predicted exactly once, in an order that the seed fixes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ByteTokenizer

from nybble.training.data import Batches, pack, read_documents, split, to_tokens, tokenize


def test_documents_are_separated_by_the_end_token_and_empty_ones_left_out() -> None:
    tokens = tokenize(["ab", "", "c"], ByteTokenizer())
    assert tokens.tolist() == [97, 98, 0, 99, 0]


@given(count=st.integers(2, 200), seq_len=st.integers(1, 50))
def test_packing_predicts_every_token_but_the_first_once_and_leaves_less_than_a_row(count: int, seq_len: int) -> None:
    tokens = torch.arange(count)
    if count <= seq_len:
        with pytest.raises(ValueError, match=rf"{count} tokens.*seq_len \+ 1 = {seq_len + 1}"):
            pack(tokens, seq_len)
        return
    rows = pack(tokens, seq_len)
    assert rows.shape[1] == seq_len + 1
    targets = rows[:, 1:].flatten()
    assert targets.tolist() == list(range(1, targets.numel() + 1))
    assert (rows[:, 1:] == rows[:, :-1] + 1).all()
    assert 0 <= count - 1 - targets.numel() < seq_len


@given(rows=st.integers(1, 30), seed=st.integers(0, 5), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8))
def test_batches_only_group_one_stream_whose_epochs_are_permutations(rows: int, seed: int, sizes: list[int]) -> None:
    data = torch.arange(rows)[:, None]
    batches = Batches(data, seed)
    stream = batches.at(0, 3 * rows).flatten().tolist()
    for epoch in range(3):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    position, grouped = 0, []
    for size in sizes:
        grouped += Batches(data, seed).at(position, size).flatten().tolist()
        position += size
    assert grouped[: 3 * rows] == stream[:position]


def test_another_seed_or_epoch_gives_another_order() -> None:
    data = torch.arange(50)[:, None]
    first = Batches(data, 0).at(0, 100).flatten()
    assert not torch.equal(first[:50], first[50:])
    assert not torch.equal(first, Batches(data, 1).at(0, 100).flatten())


def test_the_held_out_rows_are_the_last_ones() -> None:
    rows = torch.arange(10)[:, None]
    train, held_out = split(rows, 0.2)
    assert train.flatten().tolist() == list(range(8))
    assert held_out is not None and held_out.flatten().tolist() == [8, 9]
    assert split(rows, 0.0)[1] is None
    with pytest.raises(ValueError, match=r"val_fraction=0\.9.*leaves none"):
        split(rows[:1], 0.9)


def test_files_and_directories_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second é", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "two\\u2028lines"}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert read_documents(tmp_path) == ["one", "two\u2028lines", "second é"]
    assert read_documents(str(tmp_path / "b.txt")) == ["second é"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"txt": "a"}', '{"text": 3}', "null"])
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: "):
        read_documents(path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"no \.txt or \.jsonl"):
        read_documents(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 text .* byte 3"):
        read_documents(tmp_path / "latin.txt")


def test_every_form_of_data_becomes_the_same_tokens(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab")
    tokenizer = ByteTokenizer()
    for data in (path, str(path), ["ab"]):
        assert to_tokens(data, tokenizer).tolist() == [97, 98, 0]
    for ids in ([97, 98, 0], torch.tensor([97, 98, 0], dtype=torch.int32)):
        assert to_tokens(ids).tolist() == [97, 98, 0]


def test_data_that_is_none_of_them_is_refused() -> None:
    tokenizer = ByteTokenizer()
    with pytest.raises(ValueError, match="data is empty"):
        to_tokens([""], tokenizer)
    with pytest.raises(ValueError, match="data is empty"):
        to_tokens([])
    with pytest.raises(ValueError, match="tokenizer is needed"):
        to_tokens(["text"])
    with pytest.raises(TypeError, match="items of float, str"):
        to_tokens(["a", 1.5], tokenizer)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="got int"):
        to_tokens(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"token ids.*torch\.float32 \[2\]"):
        to_tokens(torch.zeros(2))
    with pytest.raises(ValueError, match=r"token ids.*\[1, 2\]"):
        to_tokens(torch.zeros(1, 2, dtype=torch.int64))
