"""Training without an adapter: every weight, or the last layer alone."""

from __future__ import annotations

from torch import nn

from .linear import QuantLinear


def train_all(model: nn.Module) -> int:
    """Full fine-tuning: every floating-point parameter is trained; returns their number.

    Raises:
        ValueError: a layer is quantized, or the model has adapters: neither can be trained so.
    """
    from .adapters import adapter_names

    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    if quantized:
        raise ValueError(
            f"model: {quantized[0]} and {len(quantized) - 1} more layers are quantized and cannot be trained in full; "
            "load the original checkpoint, or train an adapter"
        )
    present = adapter_names(model)
    if present:
        raise ValueError(f"model: has adapter {present[0]!r}; delete_adapter takes it away")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def train_only(model: nn.Module, name: str) -> int:
    """Linear probing: all is frozen but the module of this name, "head" of a TextClassifier; returns the number.

    Raises:
        ValueError: there is no such module, or it has nothing that can be trained.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        raise ValueError(
            f"name is {name!r}; the model's own modules are {', '.join(n for n, _ in model.named_children())}"
        )
    if any(isinstance(module, QuantLinear) for module in modules[name].modules()):
        raise ValueError(f"name: {name} is quantized and cannot be trained")
    model.requires_grad_(False)
    trained = [p for p in modules[name].parameters() if p.is_floating_point()]
    if not trained:
        raise ValueError(f"name: {name} has no floating-point parameter")
    for parameter in trained:
        parameter.requires_grad_(True)
    return sum(p.numel() for p in trained)
