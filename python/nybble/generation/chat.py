"""A conversation, and what a model has already read of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..nn.adapters import require_names
from .config import GenerationConfig
from .decoder import Batch, ModelTraits
from .loop import Answer, Generated, acting, chat_ids, continued, room


class Chat:
    """A conversation on the tokenizer's chat template, whose cache of keys and values is kept between turns.

    A turn's template text mostly begins with the one before and its answer: only what is new is read. Where it differs
    (a template that rewrites earlier turns, another system message, another adapter), it is read from there on, or from
    the beginning. The answers are those of a fresh computation.

    Attributes:
        messages: [{"role", "content"}, ...], the system message first if there is one.
        adapter: that acts, or None. last: the last answer. read: tokens that the last turn had to read.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: GenerationConfig | None = None,
        *,
        system: str | None = None,
        adapter: str | None = None,
    ) -> None:
        """Raises ValueError: the tokenizer has no chat template, the model no such adapter, or it cannot generate."""
        self.model, self.tokenizer = model, tokenizer
        self.config = config or GenerationConfig(max_new_tokens=512)
        self._traits = ModelTraits(model)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("chat: the tokenizer has no chat template")
        self.messages: list[dict[str, str]] = []
        self.last: Generated | None = None
        self.read = 0
        self.adapter: str | None = None
        self._batch: Batch | None = None
        self._known: list[int] = []  # tokens that the batch has read
        self.use(adapter)
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message; setting it keeps the conversation. None: that of the template, if it has one."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first is not None and first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        if self.system is not None:
            del self.messages[0]
        if text is not None:
            self.messages.insert(0, {"role": "system", "content": text})

    def use(self, adapter: str | None) -> None:
        """Another adapter, or None for the base, from the next turn on."""
        if adapter is not None:
            require_names(self.model, [adapter])
        if adapter != self.adapter:
            self.adapter = adapter
            self._forget()

    def reset(self) -> None:
        """An empty conversation; the system message stays."""
        del self.messages[0 if self.system is None else 1 :]
        self.last = None

    def send(self, text: str) -> Iterator[str]:
        """The answer to a message of the user, piece by piece.

        Both join the conversation; an answer that is not asked for to its end (the iterator is closed) stays as far as
        it came. An error leaves the conversation as it was.

        Raises:
            ValueError: the conversation leaves no room in the model's context; before the first piece.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        ids = chat_ids(self.tokenizer, turns)
        try:
            (limit,) = room(self._traits, [ids], [self.adapter], self.config.max_new_tokens, ["it"])
        except ValueError as error:
            raise ValueError(f"the conversation is too long: {error}") from error
        return self._answer(turns, ids, limit)

    def _answer(self, turns: list[dict[str, str]], ids: list[int], limit: int) -> Iterator[str]:
        number = sum(turn["role"] == "assistant" for turn in turns)  # each turn has random numbers of its own
        answer = Answer(number, ids, self.adapter, limit, self.tokenizer, self.config, self._traits)
        batch, self._batch = self._prepared(ids, limit), None  # a forward pass that fails leaves half of it written
        try:
            with acting(self.model, [self.adapter]) as pause:
                new = ids[len(self._known) :]
                self.read = len(new)
                logits = batch.read([new], self.config.prefill_tokens)
                for piece in continued(batch, [answer], logits):
                    with pause():
                        if piece.text:
                            yield piece.text
        except GeneratorExit:
            self._keep(batch, answer, turns, ids)
            raise
        except BaseException:
            self._forget()
            raise
        self._keep(batch, answer, turns, ids)

    def _prepared(self, ids: Sequence[int], limit: int) -> Batch:
        """A batch that has read as much of the text as can be kept; `_known` says how much."""
        batch, known = self._batch, self._known
        common = next(
            (i for i, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), min(len(known), len(ids))
        )
        common = min(common, len(ids) - 1)  # the last token's logits are needed
        whole = common == len(known)
        if batch is None or self._traits.recurrent or not (whole or self._traits.plain):
            self._known = []
            build = self._traits.build() if self.config.kernels else None
            return Batch(self._traits, [self.adapter], len(ids) + limit, build)
        batch.capacity = max(batch.capacity, len(ids) + limit)
        if not whole:
            batch.crop(common)
            self._known = known[:common]
        return batch

    def _keep(self, batch: Batch, answer: Answer, turns: list[dict[str, str]], ids: list[int]) -> None:
        generated = answer.generated
        if not answer.done:
            answer.stream.finish()
            generated.text, generated.reason = answer.stream.text, "closed"
        self._batch, self._known = batch, [*ids, *generated.tokens[:-1]]
        self.messages = [*turns, {"role": "assistant", "content": generated.text}]
        self.last = generated

    def _forget(self) -> None:
        self._batch, self._known = None, []
