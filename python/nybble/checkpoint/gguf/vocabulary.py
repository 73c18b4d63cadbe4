"""A tokenizer as GGUF keeps it: tokens with types, merges or scores, the pre-tokenizer's name, special tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gguf
from gguf import TokenType

from ...errors import CheckpointError

BPE, SPM = "gpt2", "llama"  # GGUF's names: byte-level BPE, and SentencePiece's BPE with scores
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


@dataclass(frozen=True)
class PreTokenizer:
    """How llama.cpp splits text before merging, by the name in `tokenizer.ggml.pre`, and tokenizers' equal of it.

    steps: tokenizer.json's pre_tokenizer, a Sequence's members. ignore_merges: whether a word that is a token is taken
    whole. add_bos: what llama.cpp does when the file does not say.
    """

    steps: list[dict[str, Any]]
    ignore_merges: bool = False
    add_bos: bool = False


_DIGITS = {"type": "Digits", "individual_digits": True}
# An export takes the first name that fits, an import knows them all.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer([_byte_level(use_regex=True)]),
    "smollm": PreTokenizer([_DIGITS, _byte_level(use_regex=True)]),
    "llama-bpe": PreTokenizer(_split(_LLAMA3), ignore_merges=True, add_bos=True),
    "dbrx": PreTokenizer(_split(_LLAMA3)),
    "qwen2": PreTokenizer(_split(_QWEN2)),
    "starcoder": PreTokenizer([_DIGITS, _byte_level(use_regex=True)]),
    "refact": PreTokenizer([_DIGITS, _byte_level(use_regex=True)]),
    "llama3": PreTokenizer(_split(_LLAMA3), ignore_merges=True, add_bos=True),
    "llama-v3": PreTokenizer(_split(_LLAMA3), ignore_merges=True, add_bos=True),
    "smaug-bpe": PreTokenizer(_split(_LLAMA3)),
    "deepseek-r1-qwen": PreTokenizer(_split(_QWEN2)),
}


@dataclass
class Vocabulary:
    """A tokenizer in GGUF's terms.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE).
        pre: name of the pre-tokenizer; byte-level BPE only.
        tokens, types: by id; types are GGUF's TokenType.
        merges: pairs in the order of their rank; byte-level BPE only.
        scores: by id; SentencePiece only.
        special: ids of "bos", "eos", "unk", "pad", as far as there are any.
        add_bos, add_eos: whether encoding a text adds them.
        add_space_prefix: whether a text begins with a space of its own; SentencePiece only.
        chat_template: Jinja text, or a list of {"name", "template"}.
        notes: where llama.cpp's tokenizer may differ.
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | list[dict[str, str]] | None = None
    notes: list[str] = field(default_factory=list)

    def pad_to(self, size: int, where: str) -> None:
        """Name the rows of a token embedding that no token uses; CheckpointError if there are more tokens than rows."""
        if len(self.tokens) > size:
            raise CheckpointError(f"{where}: {len(self.tokens)} tokens, but the model embeds only {size}")
        known = set(self.tokens)
        for number in range(len(self.tokens), size):
            name = f"[PAD{number}]"
            self.tokens.append(f"[UNUSED{number}]" if name in known else name)
            self.types.append(TokenType.UNUSED)
            if self.scores:
                self.scores.append(-1000.0)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """State the tokenizer in a GGUF file."""
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.model == BPE:
            writer.add_token_merges([f"{left} {right}" for left, right in self.merges])
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.model == SPM:
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def from_fields(file: Any, size: int, pre: str | None = None) -> Vocabulary:
    """The tokenizer in the metadata of a `GGUFFile` whose model embeds `size` tokens.

    Args:
        file: the parsed header.
        size: rows of the token embedding.
        pre: a pre-tokenizer's name to use instead of the file's.

    Raises:
        CheckpointError: a key is missing or has the wrong type or length; a kind of tokenizer that cannot be converted.
    """
    fields, where = file.fields, str(file.path)
    model = fields.get("tokenizer.ggml.model")
    if model not in (BPE, SPM):
        raise CheckpointError(f"{where}: tokenizer.ggml.model is {model!r}; supported are {BPE!r} and {SPM!r}")
    tokens = _list(fields, "tokens", str, where)
    if not tokens or len(tokens) > size or len(set(tokens)) != len(tokens):
        what = "some of them equal" if len(set(tokens)) != len(tokens) else f"the model embeds {size}"
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens has {len(tokens)} tokens, {what}")
    types = _list(fields, "token_type", int, where) or [int(TokenType.NORMAL)] * len(tokens)
    scores = _list(fields, "scores", float, where) if model == SPM else []
    for key, values in (("token_type", types), ("scores", scores)):
        if len(values) != len(tokens) and (key == "token_type" or model == SPM):
            raise CheckpointError(f"{where}: tokenizer.ggml.{key} has {len(values)} elements for {len(tokens)} tokens")
    name = _pre_name(fields, pre, where) if model == BPE else None
    special = {}
    for short, long in SPECIAL.items():
        token = fields.get(f"tokenizer.ggml.{long}_token_id")
        if token is not None:
            if type(token) is not int or not 0 <= token < len(tokens):
                raise CheckpointError(f"{where}: tokenizer.ggml.{long}_token_id is {token!r}, not a token")
            special[short] = token
    template = fields.get("tokenizer.chat_template")
    default_bos = model == SPM or (name is not None and PRE_TOKENIZERS[name].add_bos)
    return Vocabulary(
        model=model,
        pre=name,
        tokens=tokens,
        types=types,
        merges=_merges(fields, where) if model == BPE else [],
        scores=scores,
        special=special,
        add_bos=bool(fields.get("tokenizer.ggml.add_bos_token", default_bos)) and "bos" in special,
        add_eos=bool(fields.get("tokenizer.ggml.add_eos_token", False)) and "eos" in special,
        add_space_prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", model == SPM)),
        chat_template=template if isinstance(template, str) else None,
    )


def _list(fields: dict[str, Any], key: str, kind: type, where: str) -> list[Any]:
    value = fields.get(f"tokenizer.ggml.{key}", [])
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise CheckpointError(f"{where}: tokenizer.ggml.{key} is not a list of {kind.__name__}")
    return list(value)


def _merges(fields: dict[str, Any], where: str) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in _list(fields, "merges", str, where)]
    wrong = next((pair for pair in pairs if len(pair) != 2), None)
    if wrong is not None:
        raise CheckpointError(f"{where}: tokenizer.ggml.merges: {' '.join(wrong)!r} is not a pair")
    return [(pair[0], pair[1]) for pair in pairs]


def _pre_name(fields: dict[str, Any], pre: str | None, where: str) -> str:
    name = fields.get("tokenizer.ggml.pre") if pre is None else pre
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{where}: pre-tokenizer (tokenizer.ggml.pre) {name!r} is not known; known are "
            f"{', '.join(PRE_TOKENIZERS)}. If it splits text as one of these, name that one (--pre)"
        )
    return name
