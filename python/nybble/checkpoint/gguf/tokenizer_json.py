"""tokenizer.json and tokenizer_config.json from and to a `Vocabulary`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import TokenType

from ...errors import CheckpointError, CheckpointNotFoundError
from ..files import read_json
from .vocabulary import BPE, PRE_TOKENIZERS, SPM, Vocabulary

_SPACE = "\u2581"  # SentencePiece's visible space
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
# What decides how text is split; the rest of a step (offsets) does not change the tokens.
_DECIDING: dict[str, dict[str, Any]] = {
    "ByteLevel": {"add_prefix_space": True, "use_regex": True},
    "Digits": {"individual_digits": False},
    "Split": {"pattern": None, "behavior": None, "invert": False},
}


def read_vocabulary(directory: Path, config: dict[str, Any], pre: str | None = None) -> Vocabulary:
    """The tokenizer of a Hugging Face directory, from its tokenizer.json.

    Args:
        directory: with tokenizer.json, and tokenizer_config.json and chat_template.jinja if there are any.
        config: the directory's config.json, which may name special tokens that the tokenizer does not.
        pre: the pre-tokenizer's name in llama.cpp, where it cannot be told from tokenizer.json.

    Raises:
        CheckpointNotFoundError: there is no tokenizer.json.
        CheckpointError: a kind of tokenizer that GGUF has no counterpart for; says what it is.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"{path}: no such file; a GGUF file contains its tokenizer. Where only another form is there, "
            f"transformers writes this one: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    content = read_json(path)
    settings_path = directory / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else model
        raise CheckpointError(f"{path}: the tokenizer model is {kind!r}; only BPE has a counterpart in llama.cpp")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise CheckpointError(f"{path}: {key} {model[key]!r} has no counterpart in llama.cpp")
    tokens, types = _tokens(content, path)
    steps = list(_flatten(content.get("pre_tokenizer"), "pretokenizers"))
    byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    vocabulary = Vocabulary(BPE if byte_level or pre else SPM, pre, tokens, types, merges=_pairs(model, path))
    if vocabulary.model == BPE:
        _describe_byte_level(vocabulary, content, steps, path)
    else:
        _describe_sentencepiece(vocabulary, content, steps, path)
    _describe_special(vocabulary, content, settings, config, path)
    vocabulary.chat_template = _chat_template(directory, settings)
    return vocabulary


def _tokens(content: dict[str, Any], path: Path) -> tuple[list[str], list[int]]:
    """Tokens by id with their types; ids that no token has are named as unused."""
    by_id: dict[int, str] = {}
    kinds: dict[int, int] = {}
    for token, number in content["model"]["vocab"].items():
        by_id[number] = token
    for added in content.get("added_tokens") or []:
        by_id[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
    if not by_id or not all(type(number) is int and 0 <= number < 1 << 24 for number in by_id):
        raise CheckpointError(f"{path}: token ids must be whole numbers from 0 on")
    size = max(by_id) + 1
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    if len(set(tokens)) != size:
        raise CheckpointError(f"{path}: a token has two ids")
    types = [kinds.get(number, TokenType.NORMAL if number in by_id else TokenType.UNUSED) for number in range(size)]
    return tokens, [int(kind) for kind in types]


def _pairs(model: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    """Merges, which tokenizer.json writes as "left right" or as ["left", "right"]."""
    pairs = []
    for merge in model.get("merges") or []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or any(" " in part for part in pair):
            raise CheckpointError(f"{path}: merge {merge!r} is not a pair of tokens without spaces")
        pairs.append((pair[0], pair[1]))
    return pairs


def _flatten(step: dict[str, Any] | None, members: str) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    if step.get("type") == "Sequence":
        for inner in step.get(members) or []:
            yield from _flatten(inner, members)
    else:
        yield step


def _deciding(steps: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    result = []
    for step in steps:
        kind = str(step.get("type"))
        defaults = _DECIDING.get(kind)
        result.append((kind, step if defaults is None else {key: step.get(key, defaults[key]) for key in defaults}))
    return result


def _describe_byte_level(
    vocabulary: Vocabulary, content: dict[str, Any], steps: list[dict[str, Any]], path: Path
) -> None:
    ignore_merges = bool(content["model"].get("ignore_merges"))
    if vocabulary.pre is None:
        fitting = (
            name
            for name, known in PRE_TOKENIZERS.items()
            if _deciding(known.steps) == _deciding(steps) and known.ignore_merges == ignore_merges
        )
        vocabulary.pre = next(fitting, None)
    if vocabulary.pre is None:
        raise CheckpointError(
            f"{path}: its pre_tokenizer {json.dumps(steps, ensure_ascii=False)} (ignore_merges {ignore_merges}) is "
            f"none of those known ({', '.join(PRE_TOKENIZERS)}); if llama.cpp has it, give its name (--pre)"
        )
    normalizers = [str(step.get("type")) for step in _flatten(content.get("normalizer"), "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise CheckpointError(f"{path}: normalizer {normalizers} has no counterpart in llama.cpp")
    if normalizers:
        vocabulary.notes.append("the tokenizer normalizes text to NFC, llama.cpp takes it as it comes")


def _describe_sentencepiece(
    vocabulary: Vocabulary, content: dict[str, Any], steps: list[dict[str, Any]], path: Path
) -> None:
    known = {token: number for number, token in enumerate(vocabulary.tokens)}
    if not content["model"].get("byte_fallback") or not all(token in known for token in _BYTE_TOKENS):
        raise CheckpointError(
            f"{path}: neither byte-level BPE nor SentencePiece's with a token for every byte; "
            f"if llama.cpp has its pre-tokenizer under a name, give that name (--pre)"
        )
    vocabulary.add_space_prefix = _space_prefix(content, steps, path)
    for token in _BYTE_TOKENS:
        vocabulary.types[known[token]] = TokenType.BYTE
    unknown = content["model"].get("unk_token")
    if unknown in known:
        vocabulary.types[known[unknown]] = TokenType.UNKNOWN
    ranks: dict[str, int] = {}
    turns = 0  # how often the merges go on to a token that is not the one before
    before = ""
    for rank, (left, right) in enumerate(vocabulary.merges):
        ranks.setdefault(left + right, rank)
        turns += left + right != before
        before = left + right
    if turns != len(ranks):
        vocabulary.notes.append(
            f"the merges of {turns - len(ranks)} tokens lie scattered, where llama.cpp has one score for a token: "
            f"it may split some words differently"
        )
    last = float(len(vocabulary.merges))
    vocabulary.scores = [
        -float(ranks.get(token, last)) if kind == TokenType.NORMAL else 0.0
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]


def _space_prefix(content: dict[str, Any], steps: list[dict[str, Any]], path: Path) -> bool:
    """Whether a leading space is added; the ways in which SentencePiece's handling of spaces is written down."""
    normalizers = list(_flatten(content.get("normalizer"), "normalizers"))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if not steps and normalizers in ([prepend, replace], [replace]):
        return len(normalizers) == 2
    if len(steps) == 1 and not normalizers and steps[0].get("type") == "Metaspace":
        scheme = steps[0].get("prepend_scheme", "always")
        if steps[0].get("replacement") == _SPACE and not steps[0].get("split", True):
            return bool(scheme != "never")
    raise CheckpointError(
        f"{path}: normalizer {json.dumps(normalizers)} and pre_tokenizer {json.dumps(steps)} are not those of a "
        f"SentencePiece tokenizer that llama.cpp knows"
    )


def _describe_special(
    vocabulary: Vocabulary, content: dict[str, Any], settings: dict[str, Any], config: dict[str, Any], path: Path
) -> None:
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    for name in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number: Any = ids.get(token) if isinstance(token, str) else None
        if number is None and name != "unk":
            stated = config.get(f"{name}_token_id")
            number = stated[0] if isinstance(stated, list) and stated else stated
        if number is None and name == "unk":
            number = ids.get(str(content["model"].get("unk_token")))
        if type(number) is int and 0 <= number < len(ids):
            vocabulary.special[name] = number
    from tokenizers import Tokenizer

    try:
        encoded = Tokenizer.from_str(json.dumps(content)).encode("a").ids
    except Exception as error:  # tokenizers raises plain Exception for whatever it cannot parse
        raise CheckpointError(f"{path}: the package tokenizers cannot read it ({error})") from error
    for name, at in (("bos", 0), ("eos", -1)):
        adds = len(encoded) > 1 and encoded[at] == vocabulary.special.get(name)
        if not content.get("post_processor"):  # then transformers may add one by these settings
            adds = bool(settings.get(f"add_{name}_token")) and name in vocabulary.special
        setattr(vocabulary, f"add_{name}", adds)


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | list[dict[str, str]] | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    return template if isinstance(template, (str, list)) else None


def tokenizer_files(vocabulary: Vocabulary, context: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, by file name."""
    from tokenizers import AddedToken, Tokenizer, models

    control = {TokenType.CONTROL, TokenType.UNKNOWN} if vocabulary.model == SPM else {TokenType.CONTROL}
    added = {*control, TokenType.USER_DEFINED}
    typed = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    vocab = {token: i for i, (token, kind) in enumerate(typed) if kind != TokenType.UNUSED}
    name = {key: vocabulary.tokens[number] for key, number in vocabulary.special.items()}
    if vocabulary.model == BPE:
        assert vocabulary.pre is not None
        known = PRE_TOKENIZERS[vocabulary.pre]
        merges = [pair for pair in vocabulary.merges if all(part in vocab for part in (*pair, pair[0] + pair[1]))]
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=known.ignore_merges)
    else:
        merges = _merges_from_scores(vocabulary, added)
        model = models.BPE(vocab=vocab, merges=merges, unk_token=name.get("unk"), fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    content = json.loads(tokenizer.to_str()) | _surroundings(vocabulary)
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in typed if kind in control]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == TokenType.USER_DEFINED])
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"add_prefix_space": False} if vocabulary.model == BPE else {}),
        **{f"{key}_token": token for key, token in sorted(name.items())},
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    if vocabulary.chat_template:
        settings["chat_template"] = vocabulary.chat_template
    return {"tokenizer.json": tokenizer.to_str(pretty=True).encode(), "tokenizer_config.json": json_bytes(settings)}


def json_bytes(content: dict[str, Any]) -> bytes:
    """A JSON file's content."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _surroundings(vocabulary: Vocabulary) -> dict[str, Any]:
    """What stands around the model in tokenizer.json: normalizer, pre-tokenizer, post-processor, decoder."""
    parts: dict[str, Any] = {"post_processor": _template(vocabulary)}
    if vocabulary.model == BPE:
        assert vocabulary.pre is not None
        steps = PRE_TOKENIZERS[vocabulary.pre].steps
        parts["pre_tokenizer"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
        parts["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return parts
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if vocabulary.add_space_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if vocabulary.add_space_prefix else []
    parts["normalizer"] = {"type": "Sequence", "normalizers": [*prefix, replace]}
    parts["decoder"] = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    return parts


def _template(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """The post-processor that adds the tokens which the file says are added; None where it adds none."""
    names = [name for name in ("bos", "eos") if getattr(vocabulary, f"add_{name}")]
    if not names:
        return None
    tokens = {name: vocabulary.tokens[vocabulary.special[name]] for name in names}

    def wrapped(text: str, type_id: int) -> list[dict[str, Any]]:
        special = {name: {"SpecialToken": {"id": token, "type_id": type_id}} for name, token in tokens.items()}
        middle = {"Sequence": {"id": text, "type_id": type_id}}
        return [part for part in (special.get("bos"), middle, special.get("eos")) if part is not None]

    ids = {token: {"id": token, "ids": [vocabulary.special[name]], "tokens": [token]} for name, token in tokens.items()}
    pair = wrapped("A", 0) + wrapped("B", 1)
    return {"type": "TemplateProcessing", "single": wrapped("A", 0), "pair": pair, "special_tokens": ids}


def _merges_from_scores(vocabulary: Vocabulary, added: set[TokenType]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best score first: what SentencePiece's BPE does by scores."""
    typed = zip(vocabulary.tokens, vocabulary.types, vocabulary.scores, strict=True)
    scores = {token: score for token, kind, score in typed if kind == TokenType.NORMAL and kind not in added}
    ranked = sorted((token for token in scores if len(token) > 1), key=lambda token: -scores[token])
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
