"""Reading, examples and batches: what a file says is what is trained on, in an order that the seed fixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ByteTokenizer

from nybble.training.data import (
    IGNORE,
    Batch,
    Batches,
    MixedBatches,
    Rows,
    make_examples,
    read_documents,
    split,
    to_tokens,
    tokenize,
)


def rows(count: int, length: int = 1, first: int = 0) -> Rows:
    """Row i holds first + i."""
    ids = (first + torch.arange(count)[:, None]).expand(count, length)
    return Rows(ids, ids)


def texts(data: Any, tokenizer: Any = None) -> list[tuple[str, str]]:
    """(text, the predicted part of it) of every example."""
    examples = make_examples(data, tokenizer or ByteTokenizer())
    made = [examples[i] for i in range(len(examples))]
    return [(bytes(ids).decode(), bytes(i for i, p in zip(ids, mask, strict=True) if p).decode()) for ids, mask in made]


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_documents_are_separated_by_the_end_token_and_empty_ones_left_out() -> None:
    tokens = tokenize(["ab", "", "c"], ByteTokenizer())
    assert tokens.tolist() == [97, 98, 0, 99, 0]


def test_files_and_directories_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second é", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "two\\u2028lines"}\n')
    (tmp_path / "c.json").write_text('[{"text": "third"}]')
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert read_documents(tmp_path) == ["one", "two\u2028lines", "second é", "third"]
    assert read_documents(str(tmp_path / "b.txt")) == ["second é"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"txt": "a"}', '{"text": 3}', "null"])
@pytest.mark.parametrize("read", [read_documents, lambda path: make_examples(path, ByteTokenizer())])
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, read: Any) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: "):
        read(path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"no \.txt, \.jsonl or \.json"):
        read_documents(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 text .* byte 3"):
        read_documents(tmp_path / "latin.txt")
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not UTF-8"):
        read_documents(tmp_path / "rows.jsonl")
    (tmp_path / "one.json").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=r"one\.json: expected a list of objects, got"):
        read_documents(tmp_path / "one.json")
    (tmp_path / "two.json").write_text('[{"text": "a"}, 3]')
    with pytest.raises(ValueError, match=r"two\.json, item 1: expected an object, got 3"):
        read_documents(tmp_path / "two.json")


def test_every_form_of_data_becomes_the_same_tokens(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab")
    tokenizer = ByteTokenizer()
    for data in (path, str(path), ["ab"]):
        assert to_tokens(data, tokenizer).tolist() == [97, 98, 0]
        assert make_examples(data, tokenizer).ids.tolist() == [97, 98, 0]
    for ids in ([97, 98, 0], torch.tensor([97, 98, 0], dtype=torch.int32)):
        assert to_tokens(ids).tolist() == [97, 98, 0]
    for ids in ([97, 98, 0], torch.tensor([97, 98, 0]), [[97, 98, 0]], [torch.tensor([97, 98, 0])]):
        assert make_examples(ids).ids.tolist() == [97, 98, 0]


def test_data_that_is_none_of_them_is_refused() -> None:
    tokenizer = ByteTokenizer()
    for make in (to_tokens, make_examples):
        with pytest.raises(ValueError, match="data is empty"):
            make([""], tokenizer)
        with pytest.raises(ValueError, match="data is empty"):
            make([])
        with pytest.raises(ValueError, match="tokenizer is needed"):
            make(["text"])
        with pytest.raises(TypeError, match="got int"):
            make(3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"token ids.*torch\.float32 \[2\]"):
            make(torch.zeros(2))
        with pytest.raises(ValueError, match=r"token ids.*\[1, 2\]"):
            make(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="items of float, str"):
        to_tokens(["a", 1.5], tokenizer)
    with pytest.raises(TypeError, match=r"data\[1\] must be a string or a dict, got float"):
        make_examples(["a", 1.5], tokenizer)
    with pytest.raises(TypeError, match="items of float, int"):
        make_examples([1, 1.5], tokenizer)


# ---- examples --------------------------------------------------------------------------------------------------------


def test_a_row_says_by_its_fields_what_it_is_and_kinds_may_be_mixed() -> None:
    data = [
        "plain",
        {"text": "said"},
        {"prompt": "2+2=", "completion": "4", "text": "ignored"},
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
        {"instruction": "Greet.", "input": "", "output": "hi", "text": "ignored"},
    ]
    assert texts(data) == [
        ("plain\0", "plain\0"),
        ("said\0", "said\0"),
        ("2+2=4\0", "4\0"),
        ("### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n4\0", "4\0"),
        ("### Instruction:\nGreet.\n\n### Response:\nhi\0", "hi\0"),
    ]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a"}, r"expected an object with text; prompt and completion; .* its fields are prompt"),
        ({"prompt": 3, "completion": "b"}, r"prompt must be a string, got 3"),
        ({"prompt": "a", "completion": None}, r"completion must be a string, got null"),
        ({"instruction": "a", "output": ["b"]}, r'output must be a string, got \["b"\]'),
        ({"instruction": "a", "input": 1, "output": "b"}, r"input must be a string, got 1"),
        ({"messages": []}, r"messages must be a list of at least one message, got \[\]"),
        ({"messages": [{"content": "a"}]}, r'messages\[0\] must be an object with a "role"'),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]\.content must be a string, got 3"),
        ({"conversations": "a"}, r"conversations must be a list of at least one turn"),
        ({"conversations": [{"from": "human"}]}, r'conversations\[0\] must be an object with "from" and a string'),
        ({"conversations": [{"from": "me", "value": "a"}]}, r"conversations\[0\]\.from is 'me'; allowed are human, "),
        ({"messages": [{"role": "user", "content": "a"}]}, r"chat data needs a tokenizer with a chat template"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_field(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: " + message):
        make_examples(path, ByteTokenizer())


def test_records_in_which_nothing_is_predicted_are_counted() -> None:
    examples = make_examples(["", "a", {"text": ""}], ByteTokenizer())
    assert len(examples) == 1 and examples.dropped == 2


# ---- batches ---------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 30), seed=st.integers(0, 5), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8))
def test_batches_only_group_one_stream_whose_epochs_are_permutations(count: int, seed: int, sizes: list[int]) -> None:
    stream = Batches(rows(count), seed).at(0, 3 * count).ids.flatten().tolist()
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    position, grouped = 0, []
    for size in sizes:
        grouped += Batches(rows(count), seed).at(position, size).ids.flatten().tolist()
        position += size
    assert grouped[: 3 * count] == stream[:position]


def test_another_seed_or_epoch_gives_another_order() -> None:
    first = Batches(rows(50), 0).at(0, 100).ids.flatten()
    assert not torch.equal(first[:50], first[50:])
    assert not torch.equal(first, Batches(rows(50), 1).at(0, 100).ids.flatten())


def test_each_adapter_sees_the_rows_of_a_run_of_its_own() -> None:
    alone = {"a": Batches(rows(5, 3), 0), "b": Batches(rows(7, 2, first=100), 1)}
    mixed = MixedBatches(alone)
    for position in (0, 3, 30):
        batch, names = mixed.at(position, 3)
        assert names == ["a"] * 3 + ["b"] * 3 and batch.ids.shape == (6, 3)
        for name, own in (("a", batch.part(0, 3)), ("b", batch.part(3, 6))):
            wanted = alone[name].at(position, 3)
            width = wanted.ids.shape[1]
            assert torch.equal(own.ids[:, :width], wanted.ids)
            assert torch.equal(own.targets[:, :width], wanted.targets)
            assert (own.targets[:, width:] == IGNORE).all()
    with pytest.raises(ValueError, match="streams is empty"):
        MixedBatches({})


def test_joining_numbers_documents_only_where_one_batch_has_several() -> None:
    one = Batch(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
    two = Batch(*(torch.tensor([v]) for v in ([5, 6], [6, IGNORE], [0, 0], [0, 1])))
    assert Batch.join([one, one]).documents is None
    joined = Batch.join([one, two])
    assert joined.documents is not None and joined.documents.tolist() == [[0, 0, 0], [0, 1, -1]]
    assert joined.positions is not None and joined.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert joined.targets.tolist() == [[2, 3, 4], [6, IGNORE, IGNORE]]
    assert joined.counted == 4 and len(joined) == 2


def test_the_held_out_rows_are_the_last_ones() -> None:
    train, held_out = split(rows(10), 0.2)
    assert train.ids.flatten().tolist() == list(range(8))
    assert held_out is not None and held_out.ids.flatten().tolist() == [8, 9]
    assert split(rows(10), 0.0)[1] is None
    with pytest.raises(ValueError, match=r"val_fraction=0\.9.*leaves none"):
        split(rows(1), 0.9)


def test_rows_refuse_fields_that_do_not_fit() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"targets must have the shape of ids, \[2, 3\], got \[2, 2\]"):
        Rows(ids, ids[:, :2])
    with pytest.raises(ValueError, match="positions and documents must both be given"):
        Rows(ids, ids, positions=ids)
    with pytest.raises(ValueError, match=r"ids must be \[rows, length\], got \[3\]"):
        Rows(ids[0], ids[0])


def test_a_batch_ends_with_its_last_target() -> None:
    made = Rows(torch.arange(8).view(2, 4), torch.tensor([[1, 2, IGNORE, IGNORE], [5, IGNORE, IGNORE, IGNORE]]))
    assert made.take([1]).ids.tolist() == [[4]]
    assert made.take([0, 1]).ids.tolist() == [[0, 1], [4, 5]]
    assert made.counted.tolist() == [2, 1]
