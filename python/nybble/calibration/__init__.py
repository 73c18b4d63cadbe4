"""Data-aware quantization: second moments of every linear layer's inputs, and codes picked by them."""

from .config import Calibration
from .rounding import Rounding

__all__ = ["Calibration", "Rounding"]
