"""What the tests of prefixes and prompts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import KINDS, build, randomize

from nybble.nn import add_prefix, add_prompt

transformers = pytest.importorskip("transformers")

METHODS: dict[str, Callable[..., Any]] = {"prefix": add_prefix, "prompt": add_prompt}
TEXT = [5, 9, 77, 31]
IMPLEMENTATIONS = ("sdpa", "eager")
each_method = pytest.mark.parametrize("method", METHODS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def with_text(tokens: torch.Tensor) -> torch.Tensor:
    """The tokens behind TEXT."""
    return torch.cat([torch.tensor([TEXT]).expand(len(tokens), -1), tokens], 1)


def need_interface(method: str, kind: str) -> None:
    """Skips the test where a prefix cannot reach the attention: transformers 4 computes BERT's past its interface."""
    if method == "prefix" and kind == "bert" and transformers.__version__.startswith("4."):
        pytest.skip("no attention interface")


def adapted(method: str, kind: str = "llama", base: str = "fp32", name: str = "default", **changes: Any) -> Any:
    """A model with virtual tokens that have been moved at random."""
    need_interface(method, kind)
    model = build(kind, base, **changes)
    METHODS[method](model, tokens=4, name=name)
    randomize(model, name)
    return model


def packed(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask [1, 1, T, T], True: may see; position_ids [1, T]) of documents in one row."""
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    mask = (document[:, None] == document).tril()
    return mask[None, None], torch.cat([torch.arange(n) for n in lengths])[None]
