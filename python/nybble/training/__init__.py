"""Fine-tuning: packed text, a loop that reads top to bottom, perplexity, and what a run leaves behind.

Names are loaded on first use: the command line reads its options from `config`, which needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import TextClassifier
    from .config import TrainConfig, learning_rate
    from .distributed.world import PeerError
    from .evaluate import perplexity
    from .loop import NonFiniteLossError, finetune
    from .report import Evaluation, TrainReport

__all__ = [
    "Evaluation",
    "NonFiniteLossError",
    "PeerError",
    "TextClassifier",
    "TrainConfig",
    "TrainReport",
    "finetune",
    "learning_rate",
    "perplexity",
]

_HOMES = {
    "classifier": ("TextClassifier",),
    "config": ("TrainConfig", "learning_rate"),
    "distributed.world": ("PeerError",),
    "evaluate": ("perplexity",),
    "loop": ("NonFiniteLossError", "finetune"),
    "report": ("Evaluation", "TrainReport"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
