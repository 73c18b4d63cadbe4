"""Tokenizers through GGUF and back: the same ids for any text, the right pre-tokenizer, special tokens, templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf_models import CHAT_TEMPLATE, SPECIAL, TEXT, VOCABULARY, write_model, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import nybble
from nybble.demo import smollm2
from nybble.errors import CheckpointError

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PRES = ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2"]
TEXTS = st.one_of(st.text(max_size=60), st.text("ab12 \n\r\t'sTt.,é日▁<|>", max_size=60), st.sampled_from(TEXT.split()))
Pair = tuple[Any, Any]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A function from a pre-tokenizer's name to (tokenizer of a model, tokenizer after GGUF and back)."""

    @cache
    def make(pre: str) -> Pair:
        root = tmp_path_factory.mktemp("tokenizer")
        source = write_model(root / "model", "llama", pre)
        nybble.export_gguf(source, root / "model.gguf")
        nybble.import_gguf(root / "model.gguf", root / "back")
        first, second = (tokenizers.Tokenizer.from_file(str(d / "tokenizer.json")) for d in (source, root / "back"))
        return first, second

    return make


@pytest.mark.parametrize("pre", PRES)
@given(text=TEXTS)
def test_ids_of_any_text(pre: str, text: str, pairs: Callable[[str], Pair]) -> None:
    first, second = pairs(pre)
    ids = first.encode(text).ids
    assert second.encode(text).ids == ids
    assert second.decode(ids, skip_special_tokens=False) == first.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("pre", PRES)
def test_special_and_added_tokens(pre: str, pairs: Callable[[str], Pair]) -> None:
    text = f"{SPECIAL[1]}user\nuse the <tool> now{SPECIAL[2]}"
    first, second = pairs(pre)
    assert second.encode(text).ids == first.encode(text).ids
    assert second.encode(text).ids[0] == 1 and second.encode(text).ids[-1] == 2
    assert second.token_to_id("<tool>") == first.token_to_id("<tool>") is not None
    kept, dropped = second.decode([1, 90, 2], skip_special_tokens=False), second.decode([1, 90, 2])
    assert kept == f"{SPECIAL[1]}{dropped}{SPECIAL[2]}"


def test_the_names_of_pre_tokenizers(tmp_path: Path) -> None:
    for pre in PRES:
        source = write_model(tmp_path / pre, "llama", pre)
        nybble.export_gguf(source, tmp_path / f"{pre}.gguf")
        fields = gguf.GGUFReader(tmp_path / f"{pre}.gguf").fields
        assert fields["tokenizer.ggml.pre"].contents() == pre


def test_template_settings_and_unused_ids(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama")
    nybble.export_gguf(source, tmp_path / "model.gguf")
    nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    first = transformers.AutoTokenizer.from_pretrained(source)
    second = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    messages = [{"role": "user", "content": "hi 12"}]
    text = second.apply_chat_template(messages, tokenize=False)
    assert text == first.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nhi 12<|im_end|>\n"
    assert [second.bos_token_id, second.eos_token_id, second.pad_token_id, second.unk_token_id] == [1, 2, 2, 0]
    assert len(second) == len(first) < VOCABULARY
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens, types = (reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert len(tokens) == VOCABULARY == len(set(tokens))
    unused = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.UNUSED]
    assert unused == [f"[PAD{i}]" for i in range(len(first), VOCABULARY)]
    assert types[:3] == [gguf.TokenType.CONTROL] * 3
    assert types[tokens.index("<tool>")] == gguf.TokenType.USER_DEFINED


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_beginning_token_is_added_where_the_tokenizer_adds_it(add_bos: bool, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama", "llama-bpe")
    write_tokenizer(source, "llama-bpe", add_bos=add_bos)
    nybble.export_gguf(source, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is add_bos
    nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    first = transformers.AutoTokenizer.from_pretrained(source)
    assert back("four bits").input_ids == first("four bits").input_ids
    assert (back("four bits").input_ids[0] == 1) is add_bos


def test_templates_in_tokenizer_config(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama")
    (source / "chat_template.jinja").unlink()
    write = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": "x"}]
    for number, template in enumerate([CHAT_TEMPLATE, write]):
        write_tokenizer(source, chat_template=template)
        (source / "chat_template.jinja").unlink()
        nybble.export_gguf(source, tmp_path / f"{number}.gguf")
        fields = gguf.GGUFReader(tmp_path / f"{number}.gguf").fields
        assert fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE


def change(directory: Path, **parts: Any) -> None:
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"] |= parts.pop("model", {})
    path.write_text(json.dumps({**content, **parts}), encoding="utf-8")


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"model": {"type": "WordPiece"}}, "the tokenizer model is 'WordPiece'; only BPE"),
        ({"model": {"dropout": 0.1}}, "dropout 0.1 has no counterpart"),
        ({"model": {"ignore_merges": True}}, r"ignore_merges True\) is none of those known .*give its name \(--pre\)"),
        ({"normalizer": {"type": "Lowercase"}}, r"normalizer \['Lowercase'\] has no counterpart"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "neither byte-level BPE nor SentencePiece's"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
            "is none of those known",
        ),
        ({"model": {"merges": ["a b c"]}}, "merge 'a b c' is not a pair"),
        ({"model": {"vocab": {"a": 0, "b": 10**12}}}, "token ids must be whole numbers"),
        (
            {"model": {"vocab": {chr(300 + i): i for i in range(VOCABULARY + 1)}, "merges": []}},
            "the model embeds only 384",
        ),
        ({"model": {"merges": [["zz", "yy"]]}}, "the package tokenizers cannot read it"),
    ],
)
def test_tokenizers_without_a_counterpart(parts: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama")
    change(source, **parts)
    with pytest.raises(CheckpointError, match=message) as error:
        nybble.export_gguf(source, tmp_path / "model.gguf")
    assert str(source / "tokenizer.json") in str(error.value)
    assert not (tmp_path / "model.gguf").exists()


def test_a_name_may_be_given(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama", "gpt-2")
    change(
        source, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    )
    nybble.export_gguf(source, tmp_path / "model.gguf", pre="jais")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == "jais"
    with pytest.raises(CheckpointError, match=r"'jais' is not known; known are gpt-2, smollm, .*\(--pre\)"):
        nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "back", pre="gpt-2")
    with pytest.raises(CheckpointError, match="'word' is not known"):
        nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "other", pre="word")


def test_nfc_is_told(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "qwen2", "qwen2")
    change(source, normalizer={"type": "NFC"})
    report = nybble.export_gguf(source, tmp_path / "model.gguf")
    assert report.notes == ["the tokenizer normalizes text to NFC, llama.cpp takes it as it comes"]


def sentencepiece(directory: Path, prefix: bool) -> None:
    """Replace the tokenizer by one as converted from SentencePiece's BPE: scores become ranks of all splits."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    letters = sorted(set(TEXT.replace(" ", "\u2581")) - set("日本語"))
    pieces = ["\u2581a", "bi", "ts", "bits", "\u2581f", "ou", "our", "\u2581four", "by", "te", "byte", "\u2581byte"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *pieces, *letters])}
    merges = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    normalizers = [{"type": "Prepend", "prepend": "\u2581"}] if prefix else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"})
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>", "fuse_unk": True}
    added = [
        {
            "id": i,
            "content": t,
            "special": True,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for i, t in enumerate(["<unk>", "<s>", "</s>"])
    ]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers}, "pre_tokenizer": None,
        "post_processor": None, "decoder": None, "model": {**model, "byte_fallback": True},
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama")
    sentencepiece(source, prefix)
    report = nybble.export_gguf(source, tmp_path / "model.gguf")
    assert report.notes == []
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.pre" not in fields
    assert fields["tokenizer.ggml.add_space_prefix"] is prefix and fields["tokenizer.ggml.add_bos_token"] is True
    types = fields["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6] and types[258:260] == [6, 1]
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    assert scores["bits"] > scores["\u2581four"] > scores["byte"] > scores["w"]
    nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    first = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    second = tokenizers.Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    for text in (*TEXT.split(), TEXT[:400], "four bits 日本 bytebits", " two  spaces", ""):
        assert second.encode(text, add_special_tokens=False).ids == first.encode(text).ids
        assert second.encode(text).ids == [1, *first.encode(text).ids]
    assert second.decode(second.encode("four bits 日本").ids) == "four bits 日本"


def test_scattered_merges_are_told(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama")
    sentencepiece(source, True)
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    merges.append(merges.pop(next(i for i, pair in enumerate(merges) if "".join(pair) == "bits")))
    extra = [["b", "its"], ["i", "ts"]]
    content["model"]["vocab"]["its"] = max(content["model"]["vocab"].values()) + 1
    content["model"]["merges"] = [extra[1], ["bi", "ts"], *merges, extra[0]]
    (source / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    report = nybble.export_gguf(source, tmp_path / "model.gguf")
    assert len(report.notes) == 1 and "lie scattered" in report.notes[0]


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    try:
        path = smollm2.find_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    from nybble.checkpoint.gguf.reader import read_gguf
    from nybble.checkpoint.gguf.tokenizer_json import read_vocabulary, tokenizer_files
    from nybble.checkpoint.gguf.vocabulary import from_fields

    directory = tmp_path_factory.mktemp("smollm2")
    before = from_fields(read_gguf(path), 49152)
    for name, content in tokenizer_files(before, 8192).items():
        (directory / name).write_bytes(content)
    after = read_vocabulary(directory, {})
    assert after == before  # every token, type, merge, special id and the template
    again = tokenizers.Tokenizer.from_str(tokenizer_files(after, 8192)["tokenizer.json"].decode())
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")), again


@given(text=TEXTS)
def test_smollm2(text: str, smol: Pair) -> None:
    first, second = smol
    assert second.encode(text).ids == first.encode(text).ids
