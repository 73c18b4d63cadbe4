"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190): trained keys and values before those of the text, in every
attention layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapters import DEFAULT
from .attention import Configs, Layer
from .tokens import Tokens, VirtualReport, activate, check_settings, check_tokens, decoder_of, first_ids, require_free
from .virtual import VirtualTokens, prepared, recorded

INITS = ("vocabulary", "random", "text")


@dataclass(frozen=True)
class PrefixConfig:
    """What `add_prefix` adds.

    Attributes:
        tokens: number of virtual tokens.
        projection: compute keys and values from one small embedding a token by a two-layer network, which the paper
            found to train more steadily; files hold what it computes.
        projection_size: of the network's hidden layer; by default that of the keys of a layer, heads * head_dim.
        init: "vocabulary" (the model's own keys and values for tokens drawn at random, the default), "text" (those for
            the beginning of a text, which the paper recommends), or "random" (normal; the default, and the only one,
            with `projection`).
        text: with "text", token ids, or a string together with `tokenizer`; repeated where it is too short.
        tokenizer: has `encode`.
        std: standard deviation of "random".
        dtype: of the parameters; they are used in the dtype of the model's keys.
    """

    tokens: int = 20
    projection: bool = False
    projection_size: int | None = None
    init: str | None = None
    text: str | Sequence[int] | None = None
    tokenizer: Any = None
    std: float = 1.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.projection_size is not None and (type(self.projection_size) is not int or self.projection_size < 1):
            raise ValueError(f"projection_size is {self.projection_size!r}; it must be an integer of 1 or more")
        if self.projection_size is not None and not self.projection:
            raise ValueError("projection_size is given, and projection is False")
        if self.init is None:
            init = "text" if self.text is not None else "random" if self.projection else "vocabulary"
            object.__setattr__(self, "init", init)
        check_settings(self, INITS)
        if self.projection and self.init != "random":
            raise ValueError(f"init is {self.init!r}; with projection it must be 'random'")


class Prefix(Tokens):
    """Keys and values of `tokens` virtual tokens in every layer; parameters layer by layer.

    Attributes:
        layers, heads, head_dim: of the model's attention; heads are those of keys and values.
        values: without projection, for every layer a Parameter [2, heads, tokens, head_dim], keys and values.
        embeddings: with projection, Parameter [tokens, heads * head_dim]; `in_weight`, `in_bias` [size, ...] of the
            first layer of its network, `out_weights`, `out_biases` of the second, for every layer [2 * heads *
            head_dim, size].
    """

    kind = "prefix"

    def __init__(
        self,
        tokens: int,
        layers: int,
        heads: int,
        head_dim: int,
        projection_size: int | None = None,
        std: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """projection_size: None: no projection."""
        super().__init__()
        check_tokens(tokens)
        self.tokens, self.heads, self.head_dim, self.std = tokens, heads, head_dim, std
        self.projection_size = projection_size
        width = heads * head_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        if projection_size is None:
            self.values = nn.ParameterList(parameter(2, heads, tokens, head_dim) for _ in range(layers))
        else:
            self.embeddings = parameter(tokens, width)
            self.in_weight, self.in_bias = parameter(projection_size, width), parameter(projection_size)
            self.out_weights = nn.ParameterList(parameter(2 * width, projection_size) for _ in range(layers))
            self.out_biases = nn.ParameterList(parameter(2 * width) for _ in range(layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All values anew: normal, the network's as nn.Linear's."""
        if self.projection_size is None:
            for values in self.values:
                nn.init.normal_(values, std=self.std)
            return
        nn.init.normal_(self.embeddings, std=self.std)
        networks = [(self.in_weight, self.in_bias), *zip(self.out_weights, self.out_biases, strict=True)]
        for weight, bias in networks:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(bias, -bound, bound)

    @property
    def layers(self) -> int:
        """Number of attention layers."""
        return len(self.values) if self.projection_size is None else len(self.out_weights)

    def keys_and_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Of one layer, each [heads, tokens, head_dim]."""
        if self.projection_size is None:
            keys, values = self.values[layer]
            return keys, values
        hidden = torch.tanh(functional.linear(self.embeddings, self.in_weight, self.in_bias))
        both = functional.linear(hidden, self.out_weights[layer], self.out_biases[layer])
        keys, values = both.view(self.tokens, 2, self.heads, self.head_dim).permute(1, 2, 0, 3)
        return keys, values

    @torch.no_grad()
    def flat(self) -> Tensor:
        """[tokens, layers * 2 * heads * head_dim] as PEFT has it: for every layer the keys, then the values."""
        parts = [torch.stack(self.keys_and_values(layer)) for layer in range(self.layers)]
        return torch.stack(parts).permute(3, 0, 1, 2, 4).reshape(self.tokens, -1)

    @torch.no_grad()
    def assign(self, flat: Tensor) -> None:
        """Takes values in the layout of `flat`; without projection only."""
        parts = flat.view(self.tokens, self.layers, 2, self.heads, self.head_dim).permute(1, 2, 3, 0, 4)
        for own, value in zip(self.values, parts, strict=True):
            own.copy_(value)

    def extra_repr(self) -> str:
        projection = "" if self.projection_size is None else f", projection_size={self.projection_size}"
        return f"tokens={self.tokens}, layers={self.layers}, heads={self.heads}, head_dim={self.head_dim}{projection}"


def add_prefix(
    model: nn.Module, config: PrefixConfig | None = None, name: str = DEFAULT, **options: Any
) -> VirtualReport:
    """Freezes a transformers model and puts a prefix into its attention layers, as the adapter `name`.

    The prefix is seen by every token of every text (and document of a packed row), which starts after it. Adapters that
    are there already stay, and stay trainable; this one acts from now on (`set_adapter`).

    Args:
        model: a decoder or encoder of transformers, with "sdpa" or "eager" attention; or a module that holds one.
        config: a PrefixConfig; or give its fields as keywords.

    Raises:
        TypeError, ValueError: a model whose attention cannot be reached, or an adapter of this name is there already.
        After an error nothing has been changed.
    """
    if config is None:
        config = PrefixConfig(**options)
    elif options:
        raise TypeError(f"give either config or its fields, not both: got {', '.join(options)} too")
    require_free(model, name)
    Configs(decoder_of(model)).check()
    decoder, virtual = prepared(model)
    layers = attention_layers(model, decoder, first_ids(config, decoder))
    prefix = prefix_for(decoder, layers, config)
    if config.init != "random":
        with torch.no_grad():
            for own, layer in zip(prefix.values, layers, strict=True):
                own.copy_(torch.cat([layer.key, layer.value]))
    put_prefix(decoder, virtual, layers, prefix, name)
    return activate(model, name, prefix)


def attention_layers(model: nn.Module, decoder: nn.Module, ids: list[int]) -> list[Layer]:
    """The model's attention layers in order, with their keys and values for a text.

    Raises:
        ValueError: not every layer has attention that can be reached, or they differ in their sizes.
    """
    layers = recorded(model, decoder, ids)
    config: Any = decoder.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    wanted = text.num_hidden_layers
    name = type(decoder).__name__
    if len(layers) != wanted:
        raise ValueError(
            f"{name} has {wanted} layers, and {len(layers)} of them compute attention through transformers' interface: "
            "a prefix would be ignored in the others. Prompt tuning (add_prompt) works"
        )
    if len({id(layer.module) for layer in layers}) != len(layers):
        raise ValueError(f"{name} uses an attention layer several times, and a prefix is one for each; see add_prompt")
    shapes = {tuple(layer.key.shape[1::2]) for layer in layers} | {tuple(layer.value.shape[1::2]) for layer in layers}
    if len(shapes) != 1 or layers[0].key.shape[2] != len(ids):
        raise ValueError(f"{name} has keys and values of different sizes ({sorted(shapes)}); see add_prompt")
    return layers


def prefix_for(decoder: nn.Module, layers: list[Layer], config: PrefixConfig) -> Prefix:
    """A random prefix that fits a model."""
    _, heads, _, head_dim = layers[0].key.shape
    size = (config.projection_size or heads * head_dim) if config.projection else None
    device = layers[0].key.device
    return Prefix(config.tokens, len(layers), heads, head_dim, size, config.std, config.dtype, device)


def put_prefix(decoder: nn.Module, virtual: VirtualTokens, layers: list[Layer], prefix: Prefix, name: str) -> None:
    """Hangs a prefix on a model."""
    virtual.put(name, prefix.train(decoder.training))
    if virtual not in decoder.children():
        virtual.attach(decoder)
    virtual.reach(decoder, [layer.module for layer in layers])
