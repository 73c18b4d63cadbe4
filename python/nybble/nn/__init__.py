"""Layers, and how to put them into a model."""

from .inject import LoRAConfig, LoRAReport, QuantizeReport, add_lora, count_parameters, quantize_
from .linear import QuantLinear
from .lora import LoRAEmbedding, LoRALinear

__all__ = [
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAReport",
    "QuantLinear",
    "QuantizeReport",
    "add_lora",
    "count_parameters",
    "quantize_",
]
