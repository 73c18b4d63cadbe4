"""Labelled texts and the classifier: what a file says, classes whatever its order, padding without effect."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import ByteTokenizer, llama, write_model
from torch import Tensor, nn

from nybble.training.classifier import ClassificationLoss, TextClassifier, accuracy
from nybble.training.data import Labelled

DATA = [("good", "yes"), ("bad!", "no"), ("so so", "maybe"), ("fine", "yes"), ("no", "no")]


def texts(data: Labelled) -> list[str]:
    return [bytes(data.take([i]).ids[0].tolist()).decode() for i in range(len(data))]


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"vocab_size": 256, "max_position_embeddings": 128, "initializer_range": 0.3}
    config = transformers.BertConfig(**{**sizes, **more, **changes})
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def classifier(encoder: nn.Module, pooling: str = "mean") -> TextClassifier:
    model = TextClassifier(encoder, 3, pooling).eval()
    nn.init.normal_(model.head.weight)
    return model


# ---- data ------------------------------------------------------------------------------------------------------------


def test_a_file_a_list_of_pairs_and_a_list_of_dicts_are_the_same_data(tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in DATA]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for source in (path, str(path), DATA, rows):
        data = Labelled.read(source, ByteTokenizer(), 100)
        assert texts(data) == [text for text, _ in DATA]
        assert data.names == ("maybe", "no", "yes")
        assert [data.names[i] for i in data.labels] == [label for _, label in DATA]


def test_classes_do_not_depend_on_the_order_of_rows_and_held_out_data_has_those_of_training() -> None:
    assert Labelled.read(DATA[::-1], ByteTokenizer(), 100).names == ("maybe", "no", "yes")
    names = Labelled.read(DATA, ByteTokenizer(), 100).names
    assert Labelled.read(DATA[:1], ByteTokenizer(), 100, names=names).labels.tolist() == [2]
    assert Labelled.read([("a", 10), ("b", 9)], ByteTokenizer(), 100).names == (9, 10)
    with pytest.raises(ValueError, match=r"data\[0\]: label 'new' is none of the 3 classes: 'maybe', 'no', 'yes'"):
        Labelled.read([("a", "new")], ByteTokenizer(), 100, names=names)


def test_batches_are_padded_to_their_longest_and_only_group_one_stream() -> None:
    data = Labelled.read(DATA, ByteTokenizer(), 100, seed=3)
    batch = data.take([0, 2])
    assert batch.ids.tolist() == [[*b"good", 0], [*b"so so"]] and batch.mask.sum(1).tolist() == [4, 5]
    stream = [text for i in range(10) for text in data.at(i, 1).labels.tolist()]
    assert [label for i in range(0, 10, 2) for label in data.at(i, 2).labels.tolist()] == stream
    assert sorted(stream[:5]) == sorted(stream[5:]) == sorted(data.labels.tolist())


def test_long_texts_are_cut_and_counted_and_parts_are_what_they_were() -> None:
    data = Labelled.read(DATA, ByteTokenizer(), 4)
    assert texts(data) == ["good", "bad!", "so s", "fine", "no"] and data.cut == 1
    train, held_out = data.split(0.4)
    assert held_out is not None and texts(train) == ["good", "bad!", "so s"] and texts(held_out) == ["fine", "no"]
    assert held_out.labels.tolist() == [2, 1] and held_out.names == data.names
    assert data.split(0.0) == (data, None)
    with pytest.raises(ValueError, match=r"val_fraction=0\.95 of 5 texts leaves none"):
        data.split(0.95)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "a"}, "expected an object with text and label"),
        ({"text": 3, "label": "a"}, "text must be a string, got 3"),
        ({"text": "a", "text_pair": 3, "label": "a"}, "text_pair must be a string, got 3"),
        ({"text": "a", "label": 1.5}, r"label must be a string or an integer, got 1\.5"),
        ({"text": "a", "label": True}, "label must be a string or an integer, got true"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine", "label": "a"}\n' + json.dumps(row))
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: " + message):
        Labelled.read(path, ByteTokenizer(), 10)


def test_what_is_no_labelled_data_is_refused() -> None:
    with pytest.raises(ValueError, match="partly strings and partly integers"):
        Labelled.read([("a", "b"), ("c", 1)], ByteTokenizer(), 10)
    with pytest.raises(ValueError, match="data is empty"):
        Labelled.read([], ByteTokenizer(), 10)
    with pytest.raises(ValueError, match="max_length must be an integer of at least 1, got 0"):
        Labelled.read(DATA, ByteTokenizer(), 0)
    with pytest.raises(ValueError, match="text_pair needs a transformers tokenizer, got ByteTokenizer"):
        Labelled.read([{"text": "a", "text_pair": "b", "label": 0}], ByteTokenizer(), 10)


def test_pairs_have_the_types_that_the_tokenizer_gives_them(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = transformers.AutoTokenizer.from_pretrained(write_model(tmp_path / "model"))
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", pair="<end> $A <end> $B:1", special_tokens=[("<end>", 0)]
    )
    # A tokenizer.json may have truncation and padding switched on.
    tokenizer._tokenizer.enable_truncation(2)
    tokenizer._tokenizer.enable_padding(length=64)
    rows = [{"text": "abc", "text_pair": "de", "label": 0}, {"text": "a", "label": 1}]
    batch = Labelled.read(rows, tokenizer, 32).take([0, 1])
    assert batch.types is not None
    assert batch.types.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0] * 7] and batch.mask.sum(1).tolist() == [7, 2]
    cut = Labelled.read(rows, tokenizer, 5)
    assert cut.cut == 1 and int(cut.starts[1]) == 5
    model = classifier(bert())
    assert ClassificationLoss(model)(batch).isfinite()
    plain = ClassificationLoss(model)(type(batch)(batch.ids, batch.mask, batch.labels))
    assert not torch.allclose(ClassificationLoss(model)(batch), plain)


# ---- the classifier --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("make", [bert, lambda: llama().model], ids=["encoder", "decoder"])
def test_padding_changes_nothing(make: Any, pooling: str) -> None:
    model = classifier(make(), pooling)
    data = Labelled.read(DATA, ByteTokenizer(), 100)
    together = data.take(range(5))
    logits = model(together.ids, together.mask)
    assert logits.shape == (5, 3) and logits.dtype == torch.float32
    for i in range(5):
        alone = data.take([i])
        torch.testing.assert_close(model(alone.ids), logits[i : i + 1], rtol=1e-4, atol=1e-4)


def test_pooling_is_of_the_tokens_it_names() -> None:
    class Echo(nn.Module):
        """Hidden states that are the ids."""

        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.PretrainedConfig(hidden_size=1)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=input_ids[..., None].float())

    ids, mask = torch.tensor([[5, 7, 9, 100]]), torch.tensor([[1, 1, 1, 0]])
    for pooling, expected in (("mean", 7.0), ("cls", 5.0), ("last", 9.0)):
        model = TextClassifier(Echo(), 2, pooling)
        nn.init.ones_(model.head.weight)
        assert model(ids, mask).tolist() == [[expected, expected]]
        left = TextClassifier(Echo(), 2, pooling)
        nn.init.ones_(left.head.weight)
        assert left(ids.flip(1), mask.flip(1))[0, 0] == {"mean": 7.0, "cls": 9.0, "last": 5.0}[pooling]


def test_the_head_is_fp32_under_autocast_and_starts_with_every_class_as_likely() -> None:
    model = TextClassifier(bert(), 3).eval()
    batch = Labelled.read(DATA, ByteTokenizer(), 100).take(range(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch.ids, batch.mask)
    assert logits.dtype == torch.float32 and not logits.any()
    assert float(ClassificationLoss(model)(batch).detach()) == pytest.approx(5 * math.log(3))


def test_linear_probing_trains_the_head_alone() -> None:
    model = TextClassifier(bert(), 3).freeze_encoder()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_accuracy_and_loss_are_those_of_each_text_alone_and_the_mode_stays() -> None:
    model, data = classifier(bert()).train(), Labelled.read(DATA, ByteTokenizer(), 100)
    model.encoder.eval()
    found = accuracy(model, data, batch_size=2)
    assert model.training and not model.encoder.training
    model.eval()
    correct, total = 0, 0.0
    with torch.no_grad():
        for i in range(5):
            batch = data.take([i])
            correct += int(model(batch.ids).argmax()) == int(batch.labels)
            total += float(ClassificationLoss(model)(batch))
    assert found.accuracy == correct / 5 and found.loss == pytest.approx(total / 5, rel=1e-4)
    with pytest.raises(ValueError, match="data is empty"):
        accuracy(model, data.part(0, 0))


def test_a_model_or_data_of_another_kind_is_named() -> None:
    batch = Labelled.read(DATA, ByteTokenizer(), 100).take([0, 1])
    with pytest.raises(ValueError, match=r"logits must be \[2, classes\], got \[2, 4, 256\]; is it a classifier\?"):
        ClassificationLoss(llama())(batch)
    with pytest.raises(ValueError, match="labels run to class 2, the model has 2 classes"):
        ClassificationLoss(TextClassifier(bert(), 2))(batch)
    with pytest.raises(ValueError, match="pooling must be one of 'mean', 'cls', 'last', got 'max'"):
        TextClassifier(bert(), 2, "max")
    with pytest.raises(ValueError, match="classes must be an integer of at least 2, got 1"):
        TextClassifier(bert(), 1)
    with pytest.raises(TypeError, match=r"encoder must be a transformers model with config\.hidden_size, got Linear"):
        TextClassifier(nn.Linear(2, 2), 2)
