"""Fine-tuning: packed text, a loop that reads top to bottom, perplexity, and what a run leaves behind."""

from nybble.training.config import TrainConfig, learning_rate
from nybble.training.evaluate import perplexity
from nybble.training.loop import Evaluation, NonFiniteLossError, TrainReport, finetune
from nybble.training.sample import generate_text

__all__ = [
    "Evaluation",
    "NonFiniteLossError",
    "TrainConfig",
    "TrainReport",
    "finetune",
    "generate_text",
    "learning_rate",
    "perplexity",
]
