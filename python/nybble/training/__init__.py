"""Fine-tuning: packed text, a loop that reads top to bottom, perplexity, and what a run leaves behind."""

from .config import TrainConfig, learning_rate
from .evaluate import perplexity
from .loop import Evaluation, NonFiniteLossError, TrainReport, finetune
from .sample import generate_text

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
