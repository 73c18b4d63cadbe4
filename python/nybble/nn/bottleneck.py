"""Bottleneck adapters: small feed-forward networks behind a frozen model's sublayers.

Houlsby et al. 2019 (arXiv 1902.00751) put one behind the attention and one behind the feed-forward of every layer,
Pfeiffer et al. 2020 (arXiv 2005.00247) only one behind the feed-forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from .adapters import DEFAULT, Adapted, acting_parameters, by_rows, check_name, freeze_base, set_adapter
from .names import adapted_layers, base_modules, patterns_of, set_module
from .quantize import count_parameters
from .sublayers import adapter_places

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
PLACEMENTS = ("houlsby", "pfeiffer")
INITS = ("zero", "near-identity")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BottleneckConfig:
    """Where and how `add_bottleneck` puts adapters.

    Attributes:
        size: of the bottleneck. reduction: instead, width of the output / reduction, rounded down.
        placement: "houlsby" (behind attention and feed-forward) or "pfeiffer" (behind the feed-forward).
        activation: "relu", "gelu", "silu" or "tanh". dropout: on the activation, while training.
        scaling: what the adapter's output is multiplied with. layer_norm: normalize the adapter's input.
        init: of the up-projection: "zero", so that a new adapter changes nothing, or "near-identity": both weights
            normal with standard deviation `std`, cut at two of them.
        target: name patterns (`nybble.formats.match_module`) of the modules to put one behind, instead of `placement`.
        dtype: of the parameters; they are used in the dtype of the output that they change.
    """

    size: int = 64
    reduction: float | None = None
    placement: str = "houlsby"
    activation: str = "relu"
    dropout: float = 0.0
    scaling: float = 1.0
    layer_norm: bool = False
    init: str = "zero"
    std: float = 0.01
    target: str | tuple[str, ...] | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"size is {self.size!r}; it must be an integer of 1 or more")
        for name, value in (("reduction", self.reduction), ("scaling", self.scaling), ("std", self.std)):
            numeric = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
            if not numeric and not (name == "reduction" and value is None):
                raise ValueError(f"{name} is {value!r}; it must be a finite number above 0")
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout!r}; it must be in [0, 1)")
        choices = (("placement", PLACEMENTS), ("activation", tuple(ACTIVATIONS)), ("init", INITS), ("dtype", DTYPES))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(map(str, allowed))}")
        if self.target is not None:
            object.__setattr__(self, "target", patterns_of(self.target))
            if not self.target:
                raise ValueError("target is empty; give name patterns, or None")

    def size_for(self, width: int) -> int:
        """Size of the bottleneck behind an output of this width."""
        return self.size if self.reduction is None else max(1, int(width / self.reduction))


class Bottleneck(nn.Module):
    """y -> y + scaling * up(dropout(activation(down(y)))), with `layer_norm` on down's input.

    Attributes:
        down_weight: Parameter [size, width]. down_bias: [size]. up_weight: [width, size]. up_bias: [width].
        norm_weight, norm_bias: Parameters [width], or None.
    """

    kind = "bottleneck"

    def __init__(self, width: int, size: int, config: BottleneckConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.activation, self.dropout, self.scaling = config.activation, config.dropout, config.scaling
        self.init, self.std, self.placement = config.init, config.std, config.placement

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=config.dtype, device=device))

        self.down_weight, self.down_bias = parameter(size, width), parameter(size)
        self.up_weight, self.up_bias = parameter(width, size), parameter(width)
        self.norm_weight = parameter(width) if config.layer_norm else None
        self.norm_bias = parameter(width) if config.layer_norm else None
        self.reset_parameters()

    @property
    def size(self) -> int:
        """Of the bottleneck."""
        return self.down_weight.shape[0]

    @property
    def width(self) -> int:
        """Of the output that it changes."""
        return self.down_weight.shape[1]

    def reset_parameters(self) -> None:
        """All values anew."""
        for zero in (self.down_bias, self.up_bias, self.up_weight):
            nn.init.zeros_(zero)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)
        if self.init == "zero":
            nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
            return
        for weight in (self.down_weight, self.up_weight):
            nn.init.trunc_normal_(weight, std=self.std, a=-2 * self.std, b=2 * self.std)

    def forward(self, y: Tensor) -> Tensor:
        """y [..., width] -> [..., width].

        What backward needs of a token is y and the activation [size] (before and after it, but for relu and tanh); with
        `layer_norm` the normalized y too.
        """
        x = y
        if self.norm_weight is not None and self.norm_bias is not None:
            x = functional.layer_norm(y, (self.width,), self.norm_weight.to(y.dtype), self.norm_bias.to(y.dtype))
        plain = ops.autocast_enabled(y.device.type)  # functional.linear casts by itself then
        weights = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        down, down_bias, up, up_bias = weights if plain else tuple(weight.to(x.dtype) for weight in weights)
        hidden = ACTIVATIONS[self.activation](functional.linear(x, down, down_bias))
        hidden = functional.dropout(hidden, self.dropout, self.training)
        if self.scaling != 1.0:  # on the small side
            hidden, up_bias = hidden * self.scaling, up_bias * self.scaling
        return y + functional.linear(hidden, up, up_bias)

    def extra_repr(self) -> str:
        norm = ", layer_norm" if self.norm_weight is not None else ""
        return f"{self.width}, size={self.size}, {self.activation}, scaling={self.scaling}{norm}"


class BottleneckAdapter(Adapted):
    """A module that ends a sublayer, and bottlenecks behind it, by adapter.

    Attributes that it does not have itself (`weight`, `bias`, `in_features`, ...) are the base's.

    Attributes:
        base: any module that returns a tensor [..., width] (an nn.Linear, a QuantLinear, a LoRALinear, ...), or a tuple
            that begins with it (a mixture of experts).
        adapters: name -> `Bottleneck`.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.train(base.training)

    @classmethod
    def from_base(
        cls, base: nn.Module, config: BottleneckConfig | None = None, name: str = DEFAULT, width: int | None = None
    ) -> BottleneckAdapter:
        """Freezes `base` and puts an adapter behind it, which acts.

        Args:
            width: of the base's output, where the base does not say so (`out_features`).

        Raises:
            ValueError: the width is not known.
        """
        module = cls(base)
        freeze_base(module)
        config = BottleneckConfig() if config is None else config
        module.add(name, config, output_width(base) if width is None else width)
        module.selection.active = name
        return module

    def add(self, name: str, config: BottleneckConfig, width: int | None) -> Bottleneck:
        """Adds and returns one more adapter.

        Raises:
            ValueError: the name cannot be used, or is taken; or the width is not known.
        """
        if width is None:
            raise ValueError(f"base is a {type(self.base).__name__}, which does not say how wide its output is")
        tensor = next(self.base.parameters(), None)
        device = None if tensor is None else tensor.device
        adapter = Bottleneck(width, config.size_for(width), config, device).train(self.training)
        self.put(name, adapter)
        return adapter

    def unwrapped(self) -> nn.Module:
        """The base."""
        base: Any = self._modules["base"]
        return base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base gives, changed by the adapters that act."""
        self.watch_recomputation()
        output = self.base(*args, **kwargs)
        selection = self.selection
        if not any(name in self.adapters for name in selection.names):
            return output
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (self._adapted(output[0]), *output[1:])
        if not isinstance(output, Tensor):
            raise TypeError(
                f"a {type(self.base).__name__} returned a {type(output).__name__}; a bottleneck adapter can stand "
                "behind a module that returns a tensor or a tuple that begins with one: name another module in target"
            )
        return self._adapted(output)

    def _adapted(self, y: Tensor) -> Tensor:
        selection = self.selection
        held: Any = self.adapters
        if selection.rows is None:
            return self.acting()(y)
        selection.check_rows(y, "BottleneckAdapter")
        groups = selection.groups(self.adapters)
        return by_rows(y, groups, lambda name, rows: rows if name is None else held[name](rows), selection)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "base" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self._modules["base"], name)


@dataclass(frozen=True)
class BottleneckReport:
    """What `add_bottleneck` did: names of the modules with an adapter behind them, parameters trained and in all."""

    targets: list[str]
    trainable: int
    total: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.total)
        head = (
            f"bottlenecks behind {len(self.targets)} modules: {self.trainable:,} of {self.total:,} parameters train "
            f"({share:.2f}%)"
        )
        return "\n".join([head, *self.notes])


def output_width(module: nn.Module) -> int | None:
    """Size of the last dimension of what a layer returns, if it says so."""
    for name in ("out_features", "nf", "embedding_dim"):  # nf: transformers' Conv1D
        value = getattr(module, name, None)
        if type(value) is int:
            return value
    shape = getattr(module, "normalized_shape", None)
    return shape[-1] if isinstance(shape, tuple) else None


def add_bottleneck(
    model: nn.Module, config: BottleneckConfig | None = None, name: str = DEFAULT, **options: Any
) -> BottleneckReport:
    """Freezes `model` and puts bottleneck adapters behind its sublayers, in place, as the adapter `name`.

    Adapters that are there already stay, and stay trainable; this one acts from now on (`set_adapter`). The sublayers
    of the architectures in `nybble.nn.sublayers` are found by themselves; `config.target` names those of others.

    Args:
        config: a BottleneckConfig; or give its fields as keywords.
        name: of the adapter; letters, digits, _ and -.

    Raises:
        PatternError: a pattern of `target` matches nothing, or the sublayers are not known.
        ValueError: the model has bottlenecks of this name, or the width of an output is not known.
        After an error nothing has been changed.
    """
    if config is None:
        config = BottleneckConfig(**options)
    elif options:
        raise TypeError(f"give either config or its fields, not both: got {', '.join(options)} too")
    check_name(name)
    present = [at for at, layer in adapted_layers(model, (BottleneckAdapter,)).items() if name in layer.adapters]
    if present:
        raise ValueError(
            f"model has bottlenecks {name!r} already ({present[0]} and {len(present) - 1} more); give another name, or "
            "delete_adapter first"
        )
    targets = adapter_places(model, config.placement, None if config.target is None else patterns_of(config.target))
    widths = {target: _width(model, target) for target in targets}
    freeze_base(model)
    put_bottlenecks(model, name, widths, config)
    set_adapter(model, name)
    trainable = sum(p.numel() for p in acting_parameters(model).values())
    return BottleneckReport(targets, trainable, count_parameters(model))


def put_bottlenecks(model: nn.Module, adapter: str, widths: Mapping[str, int], config: BottleneckConfig) -> None:
    """Puts an adapter's bottlenecks behind the modules of these names; each has the width of the module's output."""
    around = adapted_layers(model, (BottleneckAdapter,))
    outermost: dict[str, tuple[str, nn.Module]] = {}
    for name, path, inner in base_modules(model):
        outermost.setdefault(name, (path, inner))
    made: dict[int, BottleneckAdapter] = {}  # by module: one that has two names stays one
    for name, width in widths.items():
        path, base = outermost[name]
        module: Any = around.get(name) or made.get(id(base))
        if module is None:
            module = made[id(base)] = BottleneckAdapter(base)
        if name not in around:
            set_module(model, path, module)
        if adapter not in module.adapters:
            module.add(adapter, config, width)


def _width(model: nn.Module, name: str) -> int:
    module = next(module for found, _, module in base_modules(model) if found == name)
    width = output_width(module)
    if width is None:
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        width = getattr(text, "hidden_size", None)  # of a mixture of experts, say
    if type(width) is not int:
        raise ValueError(f"target: {name} is a {type(module).__name__}, which does not say how wide its output is")
    return width
