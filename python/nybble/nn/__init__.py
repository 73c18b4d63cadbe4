"""Layers, and how to put them into a model."""

from .adapters import AdapterInfo, delete_adapter, set_adapter, use_adapter
from .add import LoRAConfig, LoRAReport, add_lora
from .copies import TrainedCopy
from .embedding import LoRAEmbedding
from .factors import LoRA
from .linear import QuantLinear
from .lora import LoRALinear
from .quantize import QuantizeReport, count_parameters, quantize_
from .residual import ResidualRow, init_from_residual

__all__ = [
    "AdapterInfo",
    "LoRA",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAReport",
    "QuantLinear",
    "QuantizeReport",
    "ResidualRow",
    "TrainedCopy",
    "add_lora",
    "count_parameters",
    "delete_adapter",
    "init_from_residual",
    "quantize_",
    "set_adapter",
    "use_adapter",
]
