"""nybble: 4-bit and 8-bit weights for language models, to run and to fine-tune on the machine you own.

Nothing happens at import: no network, no probing of devices, no patching. Names are loaded on first use, so that
`nybble --help` does not wait for torch. `import nybble.ops` registers the operators (`torch.ops.nybble.*`), which a
program that only loads an exported graph needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .integrations import hook as _hook

if TYPE_CHECKING:
    from .calibration import Calibration, Rounding
    from .calibration.compare import Comparison, compare
    from .checkpoint import combine_adapters, load_adapter, load_into, merge, quantize, save_adapter, unmerge
    from .checkpoint.gguf import GGUFReport, export_gguf, import_gguf
    from .checkpoint.load import load
    from .formats import QuantConfig
    from .generation import Generated, GenerationConfig, generate
    from .introspection import Explanation, active_isa, explain, isas
    from .nn import (
        BottleneckConfig,
        BottleneckReport,
        LoRAConfig,
        LoRALinear,
        LoRAReport,
        PrefixConfig,
        PromptConfig,
        QuantizeReport,
        QuantLinear,
        VirtualReport,
        add_bottleneck,
        add_lora,
        add_prefix,
        add_prompt,
        quantize_,
    )
    from .nn.adapters import AdapterInfo, adapters, delete_adapter, set_adapter, use_adapter
    from .tensor import QuantTensor
    from .training import TrainConfig, TrainReport, finetune

__version__ = "0.1.0"

_HOMES = {
    "calibration": ("Calibration", "Rounding"),
    "calibration.compare": ("Comparison", "compare"),
    "checkpoint": (
        "combine_adapters",
        "load",
        "load_adapter",
        "load_into",
        "merge",
        "quantize",
        "save_adapter",
        "unmerge",
    ),
    "checkpoint.gguf": ("GGUFReport", "export_gguf", "import_gguf"),
    "formats": ("QuantConfig",),
    "generation": ("Generated", "GenerationConfig", "generate"),
    "introspection": ("Explanation", "active_isa", "explain", "isas"),
    "nn": (
        "BottleneckConfig",
        "BottleneckReport",
        "LoRAConfig",
        "LoRALinear",
        "LoRAReport",
        "PrefixConfig",
        "PromptConfig",
        "QuantLinear",
        "QuantizeReport",
        "VirtualReport",
        "add_bottleneck",
        "add_lora",
        "add_prefix",
        "add_prompt",
        "quantize_",
    ),
    "nn.adapters": ("AdapterInfo", "adapters", "delete_adapter", "set_adapter", "use_adapter"),
    "tensor": ("QuantTensor",),
    "training": ("TrainConfig", "TrainReport", "finetune"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterInfo",
    "BottleneckConfig",
    "BottleneckReport",
    "Calibration",
    "Comparison",
    "Explanation",
    "GGUFReport",
    "Generated",
    "GenerationConfig",
    "LoRAConfig",
    "LoRALinear",
    "LoRAReport",
    "PrefixConfig",
    "PromptConfig",
    "QuantConfig",
    "QuantLinear",
    "QuantTensor",
    "QuantizeReport",
    "Rounding",
    "TrainConfig",
    "TrainReport",
    "VirtualReport",
    "active_isa",
    "adapters",
    "add_bottleneck",
    "add_lora",
    "add_prefix",
    "add_prompt",
    "combine_adapters",
    "compare",
    "delete_adapter",
    "explain",
    "export_gguf",
    "finetune",
    "generate",
    "import_gguf",
    "isas",
    "load",
    "load_adapter",
    "load_into",
    "merge",
    "quantize",
    "quantize_",
    "save_adapter",
    "set_adapter",
    "unmerge",
    "use_adapter",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None and name not in _HOMES:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    if home is None:
        return import_module(f".{name}", __name__)
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# transformers learns of nybble's quantizer when a program uses it; nothing is imported for that here.
_hook.install()
