"""The loop that writes text after prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..nn.adapters import adapted_modules, require_names, share_selection
from .config import GenerationConfig
from .decoder import Batch, ModelTraits, set_which
from .sampling import choose
from .text import TextStream


@dataclass
class Generated:
    """What was written after one prompt.

    Attributes:
        prompt: its number. text: without the prompt, special tokens and a stop string. tokens: all that were chosen.
        prompt_tokens: tokens of the prompt. adapter: that acted, or None.
        reason: why it ended: "eos" (a token that ends it, which `tokens` has), "stop" (a stop string), "length"
            (max_new_tokens), "context" (the model's context is full); of a Chat also "closed".
    """

    prompt: int
    prompt_tokens: int
    adapter: str | None
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True)
class Piece:
    """Text that can be shown, and the number of its prompt. The last one of a prompt has `done`."""

    prompt: int
    text: str
    done: Generated | None = None


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    adapters: Any = ...,
    on_text: Callable[[int, str], None] | None = None,
    labels: Sequence[str] | None = None,
    **options: Any,
) -> list[Generated]:
    """Writes text after prompts, all of them in one batch.

    The model's mode, the adapters that act, and torch's random numbers are the same afterwards. In fp32 a prompt's
    tokens are those that it gets alone; in 16 bits sums are rounded, and a batch's may round otherwise where two tokens
    are as likely to within that rounding.

    Args:
        model: a causal model of transformers, with nybble's layers and adapters inside or without.
        tokenizer: has `encode`, and `decode` of (ids, skip_special_tokens).
        prompts: a text or its token ids, or several; special tokens are added to texts as the tokenizer does.
        config: a GenerationConfig; or give its fields as keywords.
        adapters: a name, or None for the base, for all prompts, or one of these for each; by default what acts now.
        on_text: called with a prompt's number and each piece of its text, as soon as it is known.
        labels: what errors call each prompt, such as the line of a file that it came from; "prompt 0" and so on.

    Returns:
        One `Generated` for each prompt, in their order.

    Raises:
        TypeError, ValueError: a prompt that is empty or leaves no room in the model's context, an adapter that the
            model does not have, another number of adapters than of prompts, a model that cannot generate: by name.
    """
    results: dict[int, Generated] = {}
    for piece in stream(model, tokenizer, prompts, config, adapters=adapters, labels=labels, **options):
        if piece.text and on_text is not None:
            on_text(piece.prompt, piece.text)
        if piece.done is not None:
            results[piece.prompt] = piece.done
    return [results[number] for number in sorted(results)]


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    adapters: Any = ...,
    labels: Sequence[str] | None = None,
    **options: Any,
) -> Iterator[Piece]:
    """`generate`, piece by piece: what can be shown, as soon as it is known.

    A piece never splits a character, and what may begin a stop string is held back. Joined, a prompt's pieces are its
    text. Between two pieces the model is as it was before: its mode, the adapters that act. Arguments and errors:
    `generate`'s, before the first piece.
    """
    if config is None:
        config = GenerationConfig(**options)
    elif options:
        raise TypeError(f"give either config or its fields, not both: got {', '.join(options)} too")
    traits = ModelTraits(model)
    texts = _token_ids(tokenizer, prompts, labels)
    labels = labels or [f"prompt {number}" for number in range(len(texts))]
    names = _adapters(model, adapters, labels)
    limits = room(traits, texts, names, config.max_new_tokens, labels)
    return _stream(traits, tokenizer, texts, names, limits, config)


def _stream(
    traits: ModelTraits,
    tokenizer: Any,
    texts: list[list[int]],
    names: list[str | None],
    limits: list[int],
    config: GenerationConfig,
) -> Iterator[Piece]:
    apart = not traits.pads(names) and len({len(text) for text in texts}) > 1
    for group in [[i] for i in range(len(texts))] if apart else [list(range(len(texts)))]:
        with acting(traits.model, [names[i] for i in group]) as pause:
            capacity = max(len(texts[i]) + limits[i] for i in group)
            build = traits.build() if config.kernels else None
            batch = Batch(traits, [names[i] for i in group], capacity, build)
            answers = [Answer(i, texts[i], names[i], limits[i], tokenizer, config, traits) for i in group]
            logits = batch.read([texts[i] for i in group], config.prefill_tokens)
            for piece in continued(batch, answers, logits):
                with pause():
                    yield piece


class Answer:
    """One prompt's answer while it grows."""

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        adapter: str | None,
        limit: int,
        tokenizer: Any,
        config: GenerationConfig,
        traits: ModelTraits,
    ) -> None:
        self.config, self.limit = config, limit
        self.generated = Generated(number, len(prompt), adapter)
        self.stream = TextStream(tokenizer, config.stops)
        self.eos = end_tokens(traits.model, tokenizer) if config.eos is None else set(config.eos or ())
        self.seen = set(prompt) if config.repetition_penalty != 1.0 else set()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return bool(self.generated.reason)

    def push(self, logits: torch.Tensor) -> Piece | None:
        """Chooses a token; what can be shown then, if anything."""
        generated = self.generated
        token = choose(logits, self.seen, self.config, generated.prompt, len(generated.tokens))
        generated.tokens.append(token)
        if self.config.repetition_penalty != 1.0:
            self.seen.add(token)
        piece = ""
        if token in self.eos:
            generated.reason = "eos"
        else:
            piece = self.stream.push(token)
            if self.stream.stopped is not None:
                generated.reason = "stop"
            elif len(generated.tokens) >= self.limit:
                generated.reason = "length" if self.limit == self.config.max_new_tokens else "context"
        if self.done:
            piece += self.stream.finish()
            generated.text = self.stream.text
            if self.stream.stopped is not None:
                generated.reason = "stop"
        return Piece(generated.prompt, piece, generated if self.done else None) if piece or self.done else None


def continued(batch: Batch, answers: list[Answer], logits: torch.Tensor) -> Iterator[Piece]:
    """Token after token until every answer has ended. logits: fp32 [B, vocabulary], after the prompts."""
    by_row = dict(zip(batch.rows, answers, strict=True))
    while True:
        values = logits.cpu()
        for place, row in enumerate(batch.rows):
            if not by_row[row].done:
                piece = by_row[row].push(values[place])
                if piece is not None:
                    yield piece
        ended = [row for row in batch.rows if by_row[row].done]
        if len(ended) == len(batch.rows):
            return
        if ended:
            batch.drop(ended)
        logits = batch.step([by_row[row].generated.tokens[-1] for row in batch.rows])


@contextmanager
def acting(model: nn.Module, names: Sequence[str | None]) -> Iterator[Callable[[], Any]]:
    """In eval mode, without gradient, with these adapters for the rows, in a `with` block.

    Gives a context in which the model is as it was before, for the time in which somebody else's code runs.
    """
    modes = [(module, module.training) for module in model.modules()]
    training = any(mode for _, mode in modes)
    selection = share_selection(model) if adapted_modules(model) else None

    def enter() -> torch.inference_mode:
        if training:
            model.eval()
        mode = torch.inference_mode()
        mode.__enter__()
        return mode

    def leave(mode: torch.inference_mode) -> None:
        mode.__exit__(None, None, None)
        if training:
            for module, was in modes:
                module.training = was

    before = None if selection is None else (selection.active, selection.rows)
    current = enter()

    @contextmanager
    def pause() -> Iterator[None]:
        nonlocal current
        inside = None if selection is None else (selection.active, selection.rows)
        leave(current)
        if selection is not None and before is not None:
            selection.active, selection.rows = before
        try:
            yield
        finally:
            current = enter()
            if selection is not None and inside is not None:
                selection.active, selection.rows = inside

    try:
        set_which(model, names)
        yield pause
    finally:
        leave(current)
        if selection is not None and before is not None:
            selection.active, selection.rows = before


# ---- arguments -------------------------------------------------------------------------------------------------------


def _token_ids(tokenizer: Any, prompts: Any, labels: Sequence[str] | None) -> list[list[int]]:
    several = not isinstance(prompts, str) and not (len(prompts) and isinstance(prompts[0], int))
    texts = []
    given = prompts if several else [prompts]
    if labels is not None and len(labels) != len(given):
        raise ValueError(f"labels has {len(labels)} names for {len(given)} prompts; give one for each")
    for number, prompt in enumerate(given):
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            which = labels[number] if labels else f"prompt {number}" if len(given) > 1 else "prompt"
            raise ValueError(f"{which} is empty: no tokens came out of it")
        texts.append(list(ids))
    if not texts:
        raise ValueError("prompts is empty; give at least one")
    return texts


def _adapters(model: nn.Module, adapters: Any, labels: Sequence[str]) -> list[str | None]:
    which, count = adapters, len(labels)
    if adapters is ...:
        which = share_selection(model).which if adapted_modules(model) else None
    if which is None or isinstance(which, str):
        names: list[str | None] = [which] * count
    else:
        names = list(which)
        if len(names) != count:
            raise ValueError(f"adapters has {len(names)} names for {count} prompts; give one for all, or one for each")
    for name, label in zip(names, labels, strict=True):
        try:
            require_names(model, [name])
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
    return names


def room(
    traits: ModelTraits,
    texts: Sequence[Sequence[int]],
    names: Sequence[str | None],
    max_new_tokens: int,
    labels: Sequence[str],
) -> list[int]:
    """Most tokens that can be written after each text. labels: what errors call them.

    Raises:
        ValueError: a text has ids that the model does not know, or leaves no room in the model's context.
    """
    limits = []
    for label, text, virtual in zip(labels, texts, traits.virtual_lengths(names), strict=True):
        if min(text) < 0 or max(text) >= traits.vocabulary:
            raise ValueError(f"{label} has token ids up to {max(text)}; the model knows {traits.vocabulary}")
        left = max_new_tokens if traits.context is None else traits.context - len(text) - virtual
        if left < 1:
            behind = f" behind {virtual} virtual tokens" if virtual else ""
            raise ValueError(
                f"{label} has {len(text)} tokens{behind}; the model's context of {traits.context} leaves no "
                "room for an answer: shorten it"
            )
        limits.append(min(left, max_new_tokens))
    return limits


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer: of the model's generation_config (or config) and of the tokenizer."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found |= set(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return found


def generate_text(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    config: GenerationConfig | None = None,
) -> str:
    """What the model writes after one prompt, without the prompt: `generate` in its shortest form.

    chat: put the prompt into the tokenizer's chat template as the user's turn. config: more settings; the arguments
    before it then do not count. Raises ValueError for what cannot be used, by name.
    """
    config = config or GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    given = chat_ids(tokenizer, [{"role": "user", "content": prompt}]) if chat else prompt
    return generate(model, tokenizer, [given], replace(config))[0].text


def chat_ids(tokenizer: Any, turns: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, with the beginning of an answer.

    Raises:
        ValueError: it has no template, or the template refuses these turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat: the tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2's, which templates raise themselves for roles that they do not take
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise ValueError(f"chat: the tokenizer's chat template refuses these turns: {error}") from error
    return list(tokenizer.encode(text, add_special_tokens=False))
