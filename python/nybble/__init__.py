"""nybble: 4-bit and 8-bit weights for language models, to run and to fine-tune on the machine you own.

Nothing happens at import: no network, no probing of devices, no patching. torch comes first, so that the compiled core
shares its OpenMP runtime.
"""

from __future__ import annotations

import torch as _torch  # noqa: F401  (before the core: one OpenMP runtime in the process)

from .checkpoint import load, load_adapter, quantize, save_adapter
from .explain import Explanation, active_isa, explain, isas
from .formats import QuantConfig
from .nn import LoRAConfig, LoRALinear, LoRAReport, QuantizeReport, QuantLinear, add_lora, quantize_
from .tensor import QuantTensor
from .training import TrainConfig, TrainReport, finetune

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "LoRAConfig",
    "LoRALinear",
    "LoRAReport",
    "QuantConfig",
    "QuantLinear",
    "QuantTensor",
    "QuantizeReport",
    "TrainConfig",
    "TrainReport",
    "active_isa",
    "add_lora",
    "explain",
    "finetune",
    "isas",
    "load",
    "load_adapter",
    "quantize",
    "quantize_",
    "save_adapter",
]
