"""Modules of which an adapter trains a copy in full: heads, norms (`modules_to_save`)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from .adapters import DEFAULT, Adapted, by_rows
from .linear import QuantLinear


class Copy(nn.Module):
    """An adapter's own copy of a module.

    Attributes:
        module: all of its floating-point parameters train; none is tied to anything.
    """

    kind = "copy"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class TrainedCopy(Adapted):
    """A frozen module and copies of it, by adapter; the copy of the adapter that acts stands in its place.

    Attributes that it does not have itself (`weight`, `in_features`, ...) are those of the copy that acts on all rows,
    or of the base. With an adapter for each row the module is given one tensor [rows, ...].

    Attributes:
        base: the frozen module. adapters: name -> `Copy`.
    """

    def __init__(self, base: nn.Module) -> None:
        """Without a copy yet; use `from_base`."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.train(base.training)

    @classmethod
    def from_base(cls, base: nn.Module, name: str = DEFAULT) -> TrainedCopy:
        """Freezes `base` and puts a copy of it beside it, which acts."""
        module = cls(base)
        module.add(name)
        module.selection.active = name
        return module

    def add(self, name: str) -> nn.Module:
        """Adds and returns one more copy of the base: its values, without its adapters; packed weights are decoded.

        Raises:
            ValueError: the name cannot be used, or is taken.
        """
        copied = full_copy(self.unwrapped())
        self.put(name, Copy(copied).train(self.training))
        return copied

    def copy_of(self, name: str) -> nn.Module:
        """The copy of an adapter."""
        adapter: Any = self.adapters[name]
        return adapter.module

    def current(self) -> nn.Module:
        """The copy that acts on all rows; the base, where none does."""
        base: Any = self._modules["base"]
        name = self.selection.active
        held: Any = self._modules["adapters"]
        return held[name].module if self.selection.rows is None and name is not None and name in held else base

    def unwrapped(self) -> nn.Module:
        """The base."""
        base: Any = self._modules["base"]
        return base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy that acts gives."""
        self.watch_recomputation()
        selection = self.selection
        if selection.rows is None:
            return self.current()(*args, **kwargs)
        base, held = self._modules["base"], self._modules["adapters"]
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise TypeError(
                f"a {type(base).__name__} of which adapters have copies: with an adapter for each row it takes exactly "
                "one tensor"
            )
        selection.check_rows(args[0], type(base).__name__)

        def run(name: str | None, x: Tensor) -> Tensor:
            return base(x) if name is None else held[name].module(x)  # type: ignore[misc,index]  # ModuleDict is typed Module

        return by_rows(args[0], selection.groups(self.adapters), run, selection)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "base" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.current(), name)


def full_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that trains in full: without adapters, packed weights decoded."""
    copied = _plain(copy.deepcopy(module))
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return copied


def _plain(module: nn.Module) -> nn.Module:
    if isinstance(module, Adapted):
        base = module.unwrapped()
        if base is None:
            raise TypeError(f"a {type(module).__name__} cannot be copied")
        return _plain(base)
    if isinstance(module, QuantLinear):
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, module.weight.device)
        linear.weight = nn.Parameter(module.dequantize())
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.detach())
        return linear.train(module.training)
    for name, child in list(module._modules.items()):
        if isinstance(child, Adapted) and child.unwrapped() is None:
            delattr(module, name)
        elif child is not None:
            module._modules[name] = _plain(child)
    return module
