"""A place inside every attention layer of a transformers model where keys and values can be added.

transformers' models compute attention through a function that the configuration names. This file registers two such
functions, "nybble_sdpa" and "nybble_eager": the named one, but with what a `Site` of the layer adds. Nothing else of
the model changes, so it works for decoders and encoders, with a cache and without, and inside the recomputed part of
activation checkpointing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SITE = "nybble_site"
_PREFIX = "nybble_"
IMPLEMENTATIONS = ("sdpa", "eager")


class Site(Protocol):
    """What stands in a layer's attribute `SITE`."""

    def extend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(key, value, mask) to compute with.

        query: [B, heads, queries, head_dim]; key, value: [B, key heads, keys, head_dim]; mask: [B or 1, 1 or heads,
        queries, keys], bool (True: may see) or additive; options: the other arguments, which may be changed.
        """
        ...


def register() -> None:
    """Make the two functions known to transformers. Pickled models call it when they are read."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for name in IMPLEMENTATIONS:
        AttentionInterface.register(_PREFIX + name, _FUNCTIONS[name])
        AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def _function(name: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        site: Site | None = module.__dict__.get(SITE)
        if site is not None:
            key, value, attention_mask = site.extend(module, query, key, value, attention_mask, options)
        return _inner(module, name)(module, query, key, value, attention_mask, **options)

    return attention


_FUNCTIONS = {name: _function(name) for name in IMPLEMENTATIONS}


def _inner(module: nn.Module, name: str) -> Callable[..., Any]:
    """The function that the layer would use itself: "eager" is a function of the file that defines its class."""
    for kind in type(module).__mro__:
        source = vars(sys.modules[kind.__module__])
        if name == "eager" and "eager_attention_forward" in source:
            return source["eager_attention_forward"]
        if name != "eager" and "ALL_ATTENTION_FUNCTIONS" in source:
            return source["ALL_ATTENTION_FUNCTIONS"][name]
    raise ValueError(f"{type(module).__name__}: its eager attention is not found")


def is_eager(module: nn.Module) -> bool:
    """Whether a layer, or a model, computes attention with additive masks."""
    config: Any = module.config
    return str(config._attn_implementation).endswith("eager")


class Configs:
    """The configurations of a model's modules, and the attention that each named before.

    Attributes:
        before: (configuration, its implementation), each configuration once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.before: list[tuple[Any, str]] = []
        for module in model.modules():
            config: Any = module.__dict__.get("config")
            name = getattr(config, "_attn_implementation", None)
            if isinstance(name, str) and all(config is not other for other, _ in self.before):
                self.before.append((config, name.removeprefix(_PREFIX)))

    def check(self) -> None:
        """Raises ValueError where the attention is one that this file does not know."""
        for config, name in self.before:
            if name not in IMPLEMENTATIONS:
                raise ValueError(
                    f"model: its attention is {name!r}; a prefix needs one of {', '.join(map(repr, IMPLEMENTATIONS))} "
                    f"(attn_implementation of from_pretrained, or set_attn_implementation); {type(config).__name__}"
                )

    def redirect(self) -> None:
        """Have all of them name this file's functions; also where somebody has chosen another one since."""
        for number, (config, before) in enumerate(self.before):
            name = config._attn_implementation
            if not name.startswith(_PREFIX):
                self.before[number] = (config, name)
                if name not in IMPLEMENTATIONS:
                    self.before[number] = (config, before)
                    raise RuntimeError(
                        f"the model's attention was set to {name!r} after a prefix was added, which then would be "
                        f"ignored; set it to {' or '.join(map(repr, IMPLEMENTATIONS))}, or delete_adapter first"
                    )
                config._attn_implementation = _PREFIX + name

    def restore(self) -> None:
        """Have all of them name what they named before."""
        for config, name in self.before:
            if config._attn_implementation.startswith(_PREFIX):
                config._attn_implementation = name


class Layer:
    """What one attention layer computed: itself, its keys and values [B, key heads, keys, head_dim]."""

    def __init__(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        self.module, self.key, self.value = module, key, value


class _Recorder:
    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def extend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        self.layers.append(Layer(module, key.detach(), value.detach()))
        return key, value, mask


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradient, for the time of a `with` block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def run(decoder: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Last hidden states [B, T, width] of a model for token ids [B, T]."""
    if "use_cache" in forward_parameters(decoder):
        inputs["use_cache"] = False
    return decoder(input_ids=ids, **inputs)[0]


def forward_parameters(decoder: nn.Module) -> list[str]:
    """Names of the arguments of a model's forward, in order."""
    import inspect

    return list(inspect.signature(decoder.forward).parameters)


def record(decoder: nn.Module, ids: Tensor) -> list[Layer]:
    """What every attention layer computes for token ids [1, T], in the order in which they run.

    Raises:
        ValueError: the attention is one that this file does not know, or is computed in another way than through
            transformers' interface.
    """
    configs = Configs(decoder)
    configs.check()
    register()
    recorder, modules = _Recorder(), list(decoder.modules())
    sites = [module.__dict__.pop(SITE, None) for module in modules]
    named = [(config, config._attn_implementation) for config, _ in configs.before]
    try:
        with evaluated(decoder):
            configs.restore()
            expected = run(decoder, ids)
            for module in modules:
                module.__dict__[SITE] = recorder
            configs.redirect()
            actual = run(decoder, ids)
    finally:
        for config, name in named:
            config._attn_implementation = name
        for module, site in zip(modules, sites, strict=True):
            module.__dict__.pop(SITE, None)
            if site is not None:
                module.__dict__[SITE] = site
    if recorder.layers and not torch.allclose(actual, expected, equal_nan=True):
        raise ValueError(
            f"{type(decoder).__name__} does not compute {configs.before[0][1]!r} attention as transformers' interface "
            f"does; set another one of {', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    return recorder.layers
