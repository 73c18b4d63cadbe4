"""Named adapters on one model: which of them act, for the whole batch or row by row.

Every module that carries adapters is an `Adapted`: a base, its adapters by name, and the `Selection` that all modules
of a model share. `set_adapter` changes it, so that a swap costs nothing and a batch can mix adapters, in training too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

DEFAULT = "default"
_REMEMBERED = 8  # what acted in a module's last forwards
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")

Which = str | None | Sequence[str | None]
"""One adapter for all rows; None: no adapter; or one of these for each row of the batch."""


class Selection:
    """Which adapters of a model act.

    Attributes:
        active: the one that acts on every row, or None.
        rows: instead, a name or None for each row of the batch; None when `active` counts.
    """

    def __init__(self, active: str | None = None, rows: tuple[str | None, ...] | None = None) -> None:
        self.active = active
        self.rows = rows
        self._kept: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: everything but what is derived."""
        return {"active": self.active, "rows": self.rows, "_kept": {}}

    @property
    def names(self) -> list[str]:
        """The adapters that act, each once, in the order of their first row."""
        acting = (self.active,) if self.rows is None else self.rows
        return list(dict.fromkeys(name for name in acting if name is not None))

    @property
    def which(self) -> Which:
        """As `set_adapter` takes it."""
        return self.active if self.rows is None else self.rows

    def members(self, name: str | None, device: torch.device | str = "cpu") -> Tensor:
        """int64: the rows that adapter `name` acts on. Only with `rows`."""
        assert self.rows is not None
        return torch.tensor([i for i, row in enumerate(self.rows) if row == name], dtype=torch.int64, device=device)

    def groups(self, present: nn.ModuleDict) -> dict[str | None, list[int]]:
        """Row numbers of each of the adapters in `present`, in the order of their first row; None: rows of no other.
        Only with `rows`."""
        assert self.rows is not None
        result: dict[str | None, list[int]] = {}
        for i, row in enumerate(self.rows):
            result.setdefault(row if row is not None and row in present else None, []).append(i)
        return result

    def constant(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """make(), a tensor that depends on `rows` and `key` alone: made once for all layers that ask for it."""
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return make()
        if self._kept.get(None) is not self.rows:
            self._kept = {None: self.rows}
        if key not in self._kept:
            with torch.inference_mode(False):  # else it could not be used in training afterwards
                self._kept[key] = make()
        return self._kept[key]

    def check_rows(self, x: Tensor, where: str) -> None:
        """Raises ValueError unless x's first dimension is the batch that `rows` describes."""
        assert self.rows is not None
        if x.dim() < 2 or x.shape[0] != len(self.rows):
            raise ValueError(
                f"{where}: its input has shape {list(x.shape)}, and adapters were chosen for {len(self.rows)} rows; "
                "the first dimension must be the batch (set_adapter with one name works for any input)"
            )


class Adapted(nn.Module):
    """A module with named adapters beside it.

    Attributes:
        adapters: name -> adapter; a module has not every adapter of the model.
        selection: which act; one object for all modules of a model.
    """

    adapters: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.selection = Selection()
        self._ran: dict[Any, int] = {}  # see `watch_recomputation`

    def put(self, name: str, adapter: nn.Module) -> None:
        """Adds an adapter.

        Raises:
            ValueError: the name cannot be used, or is taken.
        """
        check_name(name)
        if name in self.adapters:
            raise ValueError(f"adapter {name!r} is there already; delete_adapter removes it")
        self.adapters[name] = adapter

    def acting(self) -> Any:
        """The one adapter that acts on every row, None if there is none here. Only without `selection.rows`."""
        name = self.selection.active
        held: Any = self._modules["adapters"]  # not by attributes: 2 us of a layer's 30
        return None if name is None else held._modules.get(name)

    def unwrapped(self) -> nn.Module | None:
        """What stands in this module's place once it has no adapter; None: nothing."""
        raise NotImplementedError

    def removed(self) -> None:
        """Called once when this module leaves its model: what it has changed elsewhere in the model is put back."""

    def watch_recomputation(self) -> None:
        """To be called by every forward: activation checkpointing must not recompute with other adapters.

        Forwards are counted by what acted; a recomputation takes one of its own back, and is wrong if there is none
        but some of others.

        Raises:
            RuntimeError: this forward recomputes one that ran while other adapters acted.
        """
        if not (self.training or torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return  # not `training`: with reentrant checkpointing the first forward is without gradient
        which, ran = self.selection.which, self._ran
        if torch._C._current_graph_task_id() == -1:
            ran[which] = ran.pop(which, 0) + 1
            if len(ran) > _REMEMBERED:
                del ran[next(iter(ran))]
            return
        left = ran.get(which, 0)
        if left:
            ran[which] = left - 1
        elif any(ran.values()):
            others = " and ".join(repr(other) for other, count in ran.items() if count)
            raise RuntimeError(
                f"adapters were changed between forward ({others}) and backward ({which!r}), which recomputes the "
                "forward under activation checkpointing; run backward before set_adapter"
            )


def by_rows(
    x: Tensor, groups: Mapping[str | None, list[int]], run: Callable[[str | None, Tensor], Tensor], selection: Selection
) -> Tensor:
    """What run(name, rows of x) gives for every group, each row in its place: `Selection.groups`, one after another."""
    names = list(groups)
    if len(names) == 1:
        return run(names[0], x)
    order = [i for name in names for i in groups[name]]
    sorted_already = all(i == j for i, j in enumerate(order))

    def numbers(values: list[int]) -> Tensor:
        made = partial(torch.tensor, values, dtype=torch.int64, device=x.device)
        return selection.constant((*values, x.device), made)

    moved = x if sorted_already else x.index_select(0, numbers(order))
    parts, start = [], 0
    for name in names:
        parts.append(run(name, moved.narrow(0, start, len(groups[name]))))
        start += len(groups[name])
    y = torch.cat(parts)
    if sorted_already:
        return y
    return y.index_select(0, numbers(sorted(range(len(order)), key=order.__getitem__)))


def check_name(name: str) -> None:
    """Raises ValueError unless `name` can name an adapter."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter name is {name!r}; it must be of letters, digits, _ and -, and no name that torch.nn.ModuleDict "
            "uses itself"
        )


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """The modules with adapters, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the model's adapters, in the order in which they were added."""
    names: dict[str, None] = {}
    for module in adapted_modules(model).values():
        names |= dict.fromkeys(module.adapters)
    return list(names)


def share_selection(model: nn.Module) -> Selection:
    """One Selection for all modules with adapters, made if there is none; to be called after a module was added."""
    modules = list(adapted_modules(model).values())
    selection = modules[0].selection if modules else Selection()
    for module in modules:
        module.selection = selection
    return selection


def freeze_base(model: nn.Module) -> None:
    """No parameter trains any more but those of adapters."""
    held = {id(p) for module in adapted_modules(model).values() for p in module.adapters.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in held:
            parameter.requires_grad_(False)


def require_names(model: nn.Module, names: Sequence[str | None]) -> None:
    """Raises ValueError, listing what there is, when the model has no adapter of such a name."""
    present = adapter_names(model)
    for name in names:
        if name is not None and name not in present:
            shown = ", ".join(map(repr, present)) or "none"
            raise ValueError(f"the model has no adapter {name!r}; it has {shown}")


def set_adapter(model: nn.Module, which: Which) -> None:
    """Choose which of the model's adapters act from now on; nothing is copied or moved.

    Args:
        model: with adapters of any kind.
        which: a name; None for the base alone; or a list with a name or None for every row of the batch, which every
            input must then have as its first dimension. The gradient of an adapter is that of its own rows.

    Raises:
        ValueError: the model has no such adapter.
    """
    rows = None if which is None or isinstance(which, str) else tuple(which)
    require_names(model, (which,) if rows is None else rows)  # type: ignore[arg-type]  # a str or None where there are no rows
    if rows is not None and not rows:
        raise ValueError("which is empty; give one name or None for every row of the batch")
    selection = share_selection(model)
    selection.active, selection.rows = (which, None) if rows is None else (None, rows)  # type: ignore[assignment]  # as above


@contextmanager
def use_adapter(model: nn.Module, which: Which) -> Iterator[None]:
    """`set_adapter` for the time of a `with` block. Run backward inside it."""
    before = share_selection(model).which
    set_adapter(model, which)
    try:
        yield
    finally:
        set_adapter(model, before)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter away; a module that has none left gives way to its base. If it acted, none acts afterwards.

    Raises:
        ValueError: the model has no such adapter.
    """
    require_names(model, (name,))
    selection = share_selection(model)
    if name in selection.names:
        selection.active, selection.rows = None, None
    emptied: dict[int, nn.Module | None] = {}
    for module in adapted_modules(model).values():
        if name in module.adapters:
            del module.adapters[name]
            if not module.adapters:
                emptied[id(module)] = module.unwrapped()
                module.removed()
    places = [
        (parent, child, module)
        for parent in list(model.modules())
        for child, module in parent._modules.items()
        if id(module) in emptied
    ]
    for parent, child, emptied_module in places:
        base: nn.Module | None = emptied_module
        while base is not None and id(base) in emptied:  # one adapter around another
            base = emptied[id(base)]
        if base is None:
            delattr(parent, child)
        else:
            setattr(parent, child, base)


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their path in the model."""
    return {
        f"{path}.adapters.{name}.{inner}" if path else f"adapters.{name}.{inner}": parameter
        for path, module in adapted_modules(model).items()
        if name in module.adapters
        for inner, parameter in module.adapters[name].named_parameters()
    }


def acting_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by path: those of no adapter, and those of the adapters that act."""
    idle = {
        id(parameter)
        for name in adapter_names(model)
        if name not in share_selection(model).names
        for parameter in adapter_parameters(model, name).values()
    }
    return {path: p for path, p in model.named_parameters() if p.requires_grad and id(p) not in idle}


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter of a model: its name, its kinds ("lora", "bottleneck", ...), how many parameters it has, whether it
    acts on any row."""

    name: str
    kinds: tuple[str, ...]
    parameters: int
    acting: bool


def adapters(model: nn.Module) -> list[AdapterInfo]:
    """What adapters the model has."""
    found = adapted_modules(model).values()
    selection = share_selection(model)
    result = []
    for name in adapter_names(model):
        kinds = dict.fromkeys(str(getattr(m.adapters[name], "kind", "")) for m in found if name in m.adapters)
        count = sum(p.numel() for p in adapter_parameters(model, name).values())
        result.append(AdapterInfo(name, tuple(kinds), count, name in selection.names))
    return result
