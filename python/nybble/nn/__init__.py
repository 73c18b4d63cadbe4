"""Layers, and how to put them into a model."""

from .inject import LoRAConfig, LoRAReport, QuantizeReport, add_lora, count_parameters, quantize_
from .linear import QuantLinear
from .lora import LoRALinear

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "LoRAReport",
    "QuantLinear",
    "QuantizeReport",
    "add_lora",
    "count_parameters",
    "quantize_",
]
