"""Layers, and how to put them into a model."""

from .inject import LoRAConfig, LoRAReport, QuantizeReport, add_lora, count_parameters, quantize_
from .linear import QuantLinear
from .lora import LoRAEmbedding, LoRALinear
from .residual import ResidualRow, init_from_residual

__all__ = [
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAReport",
    "QuantLinear",
    "QuantizeReport",
    "ResidualRow",
    "add_lora",
    "count_parameters",
    "init_from_residual",
    "quantize_",
]
