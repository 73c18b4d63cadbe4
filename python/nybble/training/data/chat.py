"""Conversations: the tokenizer's chat template, and where in its text the assistant's answers are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .drafts import Draft, Encoded
from .read import shown

Message = dict[str, Any]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Role by ShareGPT's "from"."""


def check_messages(messages: Any, where: str, field: str = "messages") -> list[Message]:
    """The messages. Raises ValueError, naming the field, unless they are [{"role": str, "content": str}, ...]."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: {field} must be a list of at least one message, got {shown(messages)}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'{where}: {field}[{number}] must be an object with a "role", got {shown(message)}')
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"{where}: {field}[{number}].content must be a string, got {shown(content)}")
    return messages


def from_sharegpt(turns: Any, where: str) -> list[Message]:
    """[{"from", "value"}, ...] as messages. Raises ValueError, naming the field."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: conversations must be a list of at least one turn, got {shown(turns)}")
    messages = []
    for number, turn in enumerate(turns):
        field = f"{where}: conversations[{number}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f'{field} must be an object with "from" and a string "value", got {shown(turn)}')
        if turn.get("from") not in SHAREGPT_ROLES:
            allowed = ", ".join(SHAREGPT_ROLES)
            raise ValueError(f"{field}.from is {turn.get('from')!r}; allowed are {allowed}")
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return messages


class ChatTemplate:
    """A tokenizer's chat template, applied to conversations.

    Predicted are the assistant's answers alone, to the token that ends the turn. They are what the template marks by
    {% generation %}; without such marks, the text that follows the conversation before an answer (with the template's
    generation prompt) in the conversation that ends with it. A template may write an earlier turn differently once
    another follows, such as without its reasoning; a turn that this happens to becomes a draft of its own, of the
    conversation up to it, which is what a model is given when it answers. An answer with no message before it is not
    predicted: nothing asked for it.
    """

    def __init__(self, tokenizer: Any, where: str) -> None:
        """Raises ValueError when the tokenizer has no chat template."""
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{where}: chat data needs a tokenizer with a chat template, and this one has none; set "
                "tokenizer.chat_template, or give rows of prompt and completion"
            )
        self.tokenizer = tokenizer

    def drafts(self, messages: list[Message], where: str, tools: Any = None) -> list[Draft | Encoded]:
        """What to train on in one conversation; nothing when no answer of it can be predicted.

        Raises:
            ValueError: the template refuses the messages, or its generation prompt is not how its answers begin.
        """
        if _GENERATION.search(str(self.tokenizer.get_chat_template(tools=tools))):
            marked = self._apply(messages, where, tools, return_dict=True, return_assistant_tokens_mask=True)
            predicted = [bool(mark) for mark in marked["assistant_masks"]]
            return [Encoded(list(marked["input_ids"]), predicted)] if any(predicted) else []
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
        if not answers:
            return []
        whole = self._text(messages, where, tools)
        together: list[tuple[int, int]] = []
        alone: list[Draft | Encoded] = []
        for turn in answers:
            before = self._text(messages[:turn], where, tools, add_generation_prompt=True)
            to_answer = self._text(messages[: turn + 1], where, tools)
            if not to_answer.startswith(before):
                raise ValueError(
                    f"{where}: the chat template does not begin the answer messages[{turn}] with its generation prompt "
                    f"({_difference(before, to_answer)}), so where it begins is unknown; mark the answers in the "
                    "template by {% generation %} and {% endgeneration %}"
                )
            span = (len(before), len(to_answer))
            if whole.startswith(to_answer):
                together.append(span)
            else:
                alone.append(Draft(to_answer, (span,)))
        return [*([Draft(whole, tuple(together))] if together else []), *alone]

    def _text(self, messages: Sequence[Message], where: str, tools: Any, **options: Any) -> str:
        return self._apply(messages, where, tools, tokenize=False, **options)

    def _apply(self, messages: Sequence[Message], where: str, tools: Any, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tools=tools, **options)
        except Exception as error:  # whatever a template's expressions raise
            raise ValueError(
                f"{where}: the tokenizer's chat template cannot write these messages: {type(error).__name__}: {error}"
            ) from error


def _difference(expected: str, found: str) -> str:
    """Where two texts part."""
    place = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
    wanted, came = expected[place : place + 20], found[place : place + 20]
    return f"after {expected[max(0, place - 20) : place]!r} come {wanted!r} and {came!r}"
