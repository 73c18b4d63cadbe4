"""What prefixes and prompts share: settings, first values, the part of a model that they hang on, reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapters import acting_parameters, adapted_modules, check_name, freeze_base, set_adapter
from .quantize import count_parameters

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tokens(nn.Module):
    """The adapter modules of a `VirtualTokens`.

    Attributes:
        kind: "prefix" or "prompt". tokens: number of virtual tokens.
    """

    kind: str
    tokens: int


@dataclass(frozen=True)
class VirtualReport:
    """What `add_prefix` or `add_prompt` did: kind, number of virtual tokens, parameters trained and in all."""

    kind: str
    tokens: int
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.total)
        return (
            f"{self.kind} of {self.tokens} virtual tokens: {self.trainable:,} of {self.total:,} parameters train "
            f"({share:.2f}%)"
        )


# ---- settings --------------------------------------------------------------------------------------------------------


def check_settings(settings: Any, allowed: tuple[str, ...]) -> None:
    """Raises ValueError, naming it, for a setting of a PrefixConfig or PromptConfig that is not allowed.

    Args:
        allowed: values of `init`.
    """
    check_tokens(settings.tokens)
    init, std = settings.init, settings.std
    if init not in allowed:
        raise ValueError(f"init is {init!r}; allowed are {', '.join(allowed)}")
    if (init == "text") != (settings.text is not None):
        raise ValueError(f"text is {'missing' if settings.text is None else 'given'}, and init is {init!r}")
    if not isinstance(std, (int, float)) or not math.isfinite(std) or std <= 0:
        raise ValueError(f"std is {std!r}; it must be a finite number above 0")
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype is {settings.dtype}; allowed are {', '.join(map(str, DTYPES))}")


def check_tokens(tokens: Any) -> None:
    """Raises ValueError unless this can be a number of virtual tokens."""
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"tokens is {tokens!r}; it must be an integer of 1 or more")


def first_ids(settings: Any, decoder: nn.Module) -> list[int]:
    """As many token ids as there are virtual tokens: of the text, repeated where it is too short, or drawn at random.

    Raises:
        ValueError: the text is empty, or has ids that the model does not know. TypeError: it needs a tokenizer.
    """
    weight: Any = embedding(decoder).weight
    if settings.init != "text":
        return torch.randint(weight.shape[0], (settings.tokens,)).tolist()
    text: str | Sequence[int] = settings.text
    if isinstance(text, str):
        if settings.tokenizer is None:
            raise TypeError("text is a string, and no tokenizer is given; give one, or token ids")
        text = settings.tokenizer.encode(text, add_special_tokens=False)
    ids = [int(number) for number in text]
    if not ids or min(ids) < 0 or max(ids) >= weight.shape[0]:
        raise ValueError(f"text has {len(ids)} tokens; it must have 1 or more, with ids below {weight.shape[0]}")
    return [ids[i % len(ids)] for i in range(settings.tokens)]


def require_free(model: nn.Module, name: str) -> None:
    """Raises ValueError unless virtual tokens on the model can be called so."""
    check_name(name)
    for module in adapted_modules(model).values():
        adapter = dict(module.adapters.items()).get(name)
        if isinstance(adapter, Tokens):
            raise ValueError(f"model has a {adapter.kind} {name!r} already; give another name, or delete_adapter first")


def activate(model: nn.Module, name: str, tokens: Tokens) -> VirtualReport:
    """Freezes all but adapters, and has the one that was put on the model act."""
    freeze_base(model)
    set_adapter(model, name)
    trainable = sum(parameter.numel() for parameter in acting_parameters(model).values())
    return VirtualReport(tokens.kind, tokens.tokens, trainable, count_parameters(model))


# ---- models ----------------------------------------------------------------------------------------------------------


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder or encoder of a transformers model, which embeds tokens and gives the last hidden states.

    Raises:
        TypeError: the model neither is one of transformers' nor holds exactly one.
        ValueError: it is an encoder-decoder.
    """
    found = model
    if not _is_transformer(model):
        paths = [path for path, module in model.named_modules() if _is_transformer(module)]
        outermost = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
        if len(outermost) != 1:
            raise TypeError(
                f"model is a {type(model).__name__} that holds {len(outermost)} transformers models; virtual tokens "
                "need exactly one"
            )
        found = model.get_submodule(outermost[0])
    config: Any = found.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(found).__name__} is an encoder-decoder; virtual tokens need a decoder or an encoder")
    inner = getattr(found, getattr(found, "base_model_prefix", "") or "model", None)
    return inner if isinstance(inner, nn.Module) else found


def _is_transformer(module: nn.Module) -> bool:
    return hasattr(module, "get_input_embeddings") and hasattr(module, "config")


def embedding(decoder: Any) -> nn.Module:
    """What embeds the tokens."""
    return decoder.get_input_embeddings()


def embedding_dtype(decoder: nn.Module) -> torch.dtype:
    weight: Any = embedding(decoder).weight
    return weight.dtype
