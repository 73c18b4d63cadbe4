"""Layers, and how to put them into a model."""

from .adapters import AdapterInfo, delete_adapter, set_adapter, use_adapter
from .add import ALL_LINEAR, LoRAConfig, LoRAReport, add_lora
from .bottleneck import Bottleneck, BottleneckAdapter, BottleneckConfig, BottleneckReport, add_bottleneck
from .copies import TrainedCopy
from .embedding import LoRAEmbedding
from .factors import LoRA
from .full import train_all, train_only
from .linear import QuantLinear
from .lora import LoRALinear
from .prefix import Prefix, PrefixConfig, add_prefix
from .prompt import Prompt, PromptConfig, add_prompt
from .quantize import QuantizeReport, count_parameters, quantize_
from .residual import ResidualRow, init_from_residual
from .subspace import Subspace, add_subspace
from .tokens import VirtualReport
from .virtual import VirtualTokens

__all__ = [
    "ALL_LINEAR",
    "AdapterInfo",
    "Bottleneck",
    "BottleneckAdapter",
    "BottleneckConfig",
    "BottleneckReport",
    "LoRA",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAReport",
    "Prefix",
    "PrefixConfig",
    "Prompt",
    "PromptConfig",
    "QuantLinear",
    "QuantizeReport",
    "ResidualRow",
    "Subspace",
    "TrainedCopy",
    "VirtualReport",
    "VirtualTokens",
    "add_bottleneck",
    "add_lora",
    "add_prefix",
    "add_prompt",
    "add_subspace",
    "count_parameters",
    "delete_adapter",
    "init_from_residual",
    "quantize_",
    "set_adapter",
    "train_all",
    "train_only",
    "use_adapter",
]
