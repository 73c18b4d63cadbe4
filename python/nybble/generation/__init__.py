"""Generation: text after prompts, with a cache of keys and values, for every causal model and adapter.

`generate` and `stream` take prompts; `Chat` holds a conversation and what the model has already read of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import Chat
    from .config import GenerationConfig
    from .loop import Generated, Piece, generate, generate_text, stream

_HOMES = {
    "chat": ("Chat",),
    "config": ("GenerationConfig",),
    "loop": ("Generated", "Piece", "generate", "generate_text", "stream"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["Chat", "Generated", "GenerationConfig", "Piece", "generate", "generate_text", "stream"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
