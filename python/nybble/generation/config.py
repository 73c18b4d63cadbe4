"""How text is generated: how much, how a token is chosen, where it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of `generate` and `stream`.

    A token is chosen from the model's logits in this order: repetition_penalty, temperature, top_k, top_p, min_p, each
    on what the one before left.

    Attributes:
        max_new_tokens: most tokens to write.
        temperature: 0 takes the likeliest token each time; above 0 samples from softmax(logits / temperature).
        top_k: only the k likeliest tokens (and those as likely as the last of them); 0: all.
        top_p: only the likeliest tokens that together have this probability (arXiv 1904.09751); 1: all.
        min_p: only tokens at least this many times as likely as the likeliest (arXiv 2407.01082); 0: all.
        repetition_penalty: logits of tokens that occur in the prompt or the answer are divided by this where they are
            positive, else multiplied (arXiv 1909.05858); 1: nothing.
        stop: strings that end the answer; they are not part of it.
        seed: of the random numbers. A number depends on the seed, the prompt's place among the prompts and the token's
            place in the answer alone, so that an answer does not depend on what else is in the batch.
        eos: ids of the tokens that end an answer; None: those of the model's generation_config and the tokenizer's.
        prefill_tokens: prompts are read in pieces of at most so many tokens (all rows together), for memory.
        kernels: steps of one token go through nybble's own kernels where the model's build is known; else, or False,
            through the model's forward.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] = ()
    seed: int = 0
    eos: Sequence[int] | None = None
    prefill_tokens: int = 2048
    kernels: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("prefill_tokens", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        bounds = (
            ("temperature", 0.0, math.inf, "at least 0 and finite"),
            ("top_p", 0.0, 1.0, "above 0 and at most 1"),
            ("min_p", 0.0, 1.0, "from 0 to 1"),
            ("repetition_penalty", 0.0, math.inf, "above 0 and finite"),
        )
        for name, low, high, allowed in bounds:
            value = getattr(self, name)
            good = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
            if not good or (value == 0 and name in ("top_p", "repetition_penalty")):
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be strings that are not empty, got {self.stop!r}")
        object.__setattr__(self, "stop", stop)
        if self.eos is not None:
            object.__setattr__(self, "eos", tuple(int(token) for token in self.eos))

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return tuple(self.stop)
