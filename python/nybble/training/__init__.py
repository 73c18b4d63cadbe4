"""Fine-tuning: packed text, a loop that reads top to bottom, perplexity, and what a run leaves behind."""

from __future__ import annotations

from nybble.training.config import TrainConfig, learning_rate
from nybble.training.evaluate import perplexity
from nybble.training.loop import Evaluation, NonFiniteLossError, TrainReport, finetune

__all__ = [
    "Evaluation",
    "NonFiniteLossError",
    "TrainConfig",
    "TrainReport",
    "finetune",
    "learning_rate",
    "perplexity",
]
