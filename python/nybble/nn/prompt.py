"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): trained embeddings before those of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import DEFAULT, use_adapter
from .tokens import (
    Tokens,
    VirtualReport,
    activate,
    check_settings,
    check_tokens,
    embedding,
    first_ids,
    require_free,
)
from .virtual import VirtualTokens, prepared

INITS = ("vocabulary", "random", "text")


@dataclass(frozen=True)
class PromptConfig:
    """What `add_prompt` adds.

    Attributes:
        tokens: number of virtual tokens.
        init: "vocabulary" (the model's own embeddings of tokens drawn at random, the default), "text" (those of a text,
            the default where one is given), or "random" (normal).
        text: with "text", token ids, or a string together with `tokenizer`; repeated where it is too short.
        tokenizer: has `encode`.
        std: standard deviation of "random", in that of the model's embeddings.
        dtype: of the parameters; they are used in the dtype of the model's embeddings.
    """

    tokens: int = 20
    init: str | None = None
    text: str | Sequence[int] | None = None
    tokenizer: Any = None
    std: float = 1.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.init is None:
            object.__setattr__(self, "init", "vocabulary" if self.text is None else "text")
        check_settings(self, INITS)


class Prompt(Tokens):
    """Embeddings of virtual tokens.

    Attributes:
        embeddings: Parameter [tokens, width].
    """

    kind = "prompt"

    def __init__(
        self,
        tokens: int,
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        init: str = "random",
    ) -> None:
        super().__init__()
        check_tokens(tokens)
        self.tokens, self.init = tokens, init
        self.embeddings = nn.Parameter(torch.randn(tokens, width, dtype=dtype, device=device))

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, width={self.embeddings.shape[1]}"


def add_prompt(
    model: nn.Module, config: PromptConfig | None = None, name: str = DEFAULT, **options: Any
) -> VirtualReport:
    """Freezes a transformers model and puts a prompt before its texts, as the adapter `name`.

    The model's output is that of the text alone: as long as without a prompt. Every document of a packed row sees the
    prompt, and starts after it. Adapters that are there already stay, and stay trainable; this one acts from now on
    (`set_adapter`).

    Args:
        model: a decoder or encoder of transformers; or a module that holds one.
        config: a PromptConfig; or give its fields as keywords.

    Raises:
        TypeError, ValueError: a model that cannot have one, or an adapter of this name is there already.
        After an error nothing has been changed.
    """
    if config is None:
        config = PromptConfig(**options)
    elif options:
        raise TypeError(f"give either config or its fields, not both: got {', '.join(options)} too")
    require_free(model, name)
    decoder, virtual = prepared(model)
    values = embeddings_of(model, decoder, first_ids(config, decoder))
    prompt = Prompt(config.tokens, values.shape[1], config.dtype, values.device, str(config.init))
    with torch.no_grad():
        if config.init == "random":
            prompt.embeddings.mul_(config.std * values.std())
        else:
            prompt.embeddings.copy_(values)
    put_prompt(decoder, virtual, prompt, name)
    return activate(model, name, prompt)


@torch.no_grad()
def embeddings_of(model: nn.Module, decoder: nn.Module, ids: list[int]) -> Tensor:
    """fp32 [tokens, width]: the model's own embeddings, without adapters, of token ids."""
    table = embedding(decoder)
    weight: Any = table.weight
    with use_adapter(model, None):
        return table(torch.tensor(ids, device=weight.device)).float()


def put_prompt(decoder: nn.Module, virtual: VirtualTokens, prompt: Prompt, name: str) -> None:
    """Hangs a prompt on a model."""
    virtual.put(name, prompt.train(decoder.training))
    if virtual not in decoder.children():
        virtual.attach(decoder)
