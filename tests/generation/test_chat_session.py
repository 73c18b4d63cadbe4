"""Conversations: what was read is kept, and the answers are those of a fresh computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import decoder
from test_greedy import add
from tiny import ByteTokenizer, llama

import nybble
from nybble.generation import Chat, GenerationConfig


class ChatTokenizer(ByteTokenizer):
    """Turns as lines with a letter for the role."""

    chat_template = "lines"

    def apply_chat_template(self, turns: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        return "".join(f"{t['role'][0]}:{t['content']}\n" for t in turns) + "a:" * add_generation_prompt

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode(errors="surrogateescape"))

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return bytes(int(i) for i in ids if i).decode("latin-1")


class ForgetfulTokenizer(ChatTokenizer):
    """A template that shows only the last message of the user."""

    def apply_chat_template(self, turns: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        return super().apply_chat_template(turns[-1:], tokenize, add_generation_prompt)


CONFIG = GenerationConfig(max_new_tokens=6, eos=())


def ascii_model(**changes: Any) -> Any:
    """A model that writes letters only, so that what it has written is read as it was chosen."""
    model = llama(max_position_embeddings=512, tie_word_embeddings=False, **changes)
    with torch.no_grad():
        model.lm_head.weight[:97] *= 0.01
        model.lm_head.weight[123:] *= 0.01
    return model


def fresh(model: Any, tokenizer: Any, messages: list[dict[str, str]], adapter: str | None = None) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text)
    return nybble.generate(model, tokenizer, [ids], CONFIG, adapters=adapter)[0].text


def talk(chat: Chat, *messages: str) -> list[int]:
    """Sends messages, each answer compared with a fresh computation; how many tokens each turn read."""
    counts = []
    for message in messages:
        before = [*chat.messages, {"role": "user", "content": message}]
        answer = "".join(chat.send(message))
        counts.append(chat.read)
        assert answer == fresh(chat.model, chat.tokenizer, before, chat.adapter)
        assert chat.messages == [*before, {"role": "assistant", "content": answer}]
    return counts


@pytest.mark.parametrize("kernels", [True, False])
def test_a_turn_reads_only_what_is_new(kernels: bool) -> None:
    model, tokenizer = ascii_model(), ChatTokenizer()
    chat = Chat(model, tokenizer, GenerationConfig(max_new_tokens=6, eos=(), kernels=kernels))
    counts = talk(chat, "hello", "and more", "x")
    assert counts[0] == len("u:hello\na:")
    # The last token of an answer was chosen, not read; then comes what the template puts behind it.
    assert counts[1] == 1 + len("\nu:and more\na:") and counts[2] == 1 + len("\nu:x\na:")


def test_a_template_that_rewrites_is_read_again_from_where_it_differs() -> None:
    chat = Chat(ascii_model(), ForgetfulTokenizer(), CONFIG)
    counts = talk(chat, "hello", "help", "other")
    assert counts[1] == len("u:help\na:") - len("u:hel") and counts[2] == len("u:other\na:") - len("u:")


def test_system_message_reset_and_adapters() -> None:
    model = ascii_model()
    add(model, "lora", "one", 1)
    add(model, "prompt", "two", 2)
    add(model, "prefix", "three", 3)
    chat = Chat(model, ChatTokenizer(), CONFIG, system="be kind")
    talk(chat, "hello", "more")
    chat.system = "be short"
    assert talk(chat, "again")[0] > 30
    for adapter in ("one", "two", "three", None):
        chat.use(adapter)
        first, second = talk(chat, "now", "then")
        assert first > 40 and second < 20
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be short"}]
    talk(chat, "hello")
    chat.system = None
    assert chat.messages[0]["role"] == "user"
    with pytest.raises(ValueError, match="no adapter 'x'"):
        chat.use("x")


@pytest.mark.parametrize("name", ["mistral-window", "mamba", "gpt2"])
def test_other_caches(name: str) -> None:
    model = decoder(name)
    chat = Chat(model, ChatTokenizer(), CONFIG)
    for message in ("hello", "more", "x"):
        before = [*chat.messages, {"role": "user", "content": message}]
        assert "".join(chat.send(message)) == fresh(model, chat.tokenizer, before)


def test_an_answer_that_is_cut_off_stays_as_far_as_it_came() -> None:
    model = ascii_model()
    chat = Chat(model, ChatTokenizer(), GenerationConfig(max_new_tokens=40, eos=()))
    pieces = chat.send("hello")
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": begun} and chat.last is not None
    assert chat.last.reason == "closed"
    chat.config = CONFIG
    assert talk(chat, "go on")[0] < 20


def test_a_conversation_that_is_too_long_says_so_and_stays_as_it_was() -> None:
    chat = Chat(llama(), ChatTokenizer(), CONFIG)
    "".join(chat.send("hello"))
    before = list(chat.messages)
    with pytest.raises(ValueError, match=r"conversation is too long: it has \d+ tokens; the model.s context of 128"):
        chat.send("x" * 200)
    assert chat.messages == before


def test_an_error_within_an_answer_leaves_the_conversation_and_no_half_read_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ascii_model()
    chat = Chat(model, ChatTokenizer(), CONFIG)
    talk(chat, "hello")
    before = list(chat.messages)
    with monkeypatch.context() as patch:
        patch.setattr(chat.tokenizer, "decode", lambda *a, **k: 1 / 0, raising=False)
        with pytest.raises(ZeroDivisionError):
            "".join(chat.send("more"))
    assert chat.messages == before
    talk(chat, "more")


def test_errors() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        Chat(llama(), ByteTokenizer())
    with pytest.raises(ValueError, match="no adapter 'x'; it has none"):
        Chat(llama(), ChatTokenizer(), adapter="x")
