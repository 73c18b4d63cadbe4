"""Virtual tokens: prefix tuning (arXiv 2101.00190) and prompt tuning (arXiv 2104.08691) for transformers' models.

A `Prefix` holds keys and values for every layer, which stand before those of the text; a `Prompt` holds embeddings that
stand before those of the text. Either is attached to a model as a submodule and acts through a forward pre-hook, so
that the model's own classes stay as they are; `detach` takes it away again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

ATTRIBUTE = "nybble_virtual"


class Virtual(nn.Module):
    """What `Prefix` and `Prompt` share.

    Attributes:
        embeddings: Parameter [tokens, width], trained.
    """

    embeddings: nn.Parameter

    @property
    def tokens(self) -> int:
        """Number of virtual tokens."""
        return self.embeddings.shape[0]

    def change(self, model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _extend_mask(self, kwargs: dict[str, Any]) -> None:
        """Let the text see the virtual tokens, and let the model count positions from them on."""
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if mask.dim() != 2:
                raise ValueError(
                    f"attention_mask has {mask.dim()} dimensions; with virtual tokens it must be [batch, length]"
                )
            kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], self.tokens), mask], dim=1)
        kwargs.pop("position_ids", None)
        kwargs.pop("cache_position", None)


class Prefix(Virtual):
    """Keys and values of `tokens` virtual tokens in every layer.

    Args:
        tokens: number of virtual tokens. layers, heads, head_dim: of the model; heads are its key and value heads.

    `embeddings` is [tokens, layers * 2 * heads * head_dim]: for every layer the keys, then the values.
    """

    def __init__(
        self,
        tokens: int,
        layers: int,
        heads: int,
        head_dim: int,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}; it must be 1 or more")
        self.layers, self.heads, self.head_dim = layers, heads, head_dim
        self.embeddings = nn.Parameter(torch.randn(tokens, layers * 2 * heads * head_dim, device=device, dtype=dtype))

    @classmethod
    def for_model(cls, model: nn.Module, tokens: int) -> Prefix:
        """A random prefix that fits a transformers model."""
        layers, heads, head_dim = attention_sizes(model)
        return cls(tokens, layers, heads, head_dim, _embedding(model).weight.device)

    def change(self, model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a forward call with the prefix in the cache."""
        text: Any = kwargs.get("input_ids")
        text = kwargs["inputs_embeds"] if text is None else text
        cache = kwargs.get("past_key_values")
        if cache is None:
            from transformers import DynamicCache

            cache = kwargs["past_key_values"] = DynamicCache()
        if cache.get_seq_length() == 0:
            dtype = _embedding(model).weight.dtype
            parts = self.embeddings.to(dtype).view(self.tokens, self.layers * 2, self.heads, self.head_dim)
            parts = parts.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, text.shape[0], -1, -1, -1)
            for layer in range(self.layers):
                cache.update(parts[2 * layer], parts[2 * layer + 1], layer)
        self._extend_mask(kwargs)
        return kwargs


class Prompt(Virtual):
    """Embeddings of `tokens` virtual tokens before the text's: the logits begin with theirs."""

    def __init__(self, tokens: int, width: int, device: Any = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}; it must be 1 or more")
        self.embeddings = nn.Parameter(torch.randn(tokens, width, device=device, dtype=dtype) / math.sqrt(width))

    @classmethod
    def for_model(cls, model: nn.Module, tokens: int) -> Prompt:
        """A prompt of embeddings of the model's own vocabulary, drawn at random."""
        table = _embedding(model).weight.detach()
        result = cls(tokens, table.shape[1], table.device)
        with torch.no_grad():
            result.embeddings.copy_(table[torch.randint(table.shape[0], (tokens,), device=table.device)])
        return result

    def change(self, model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a forward call with the prompt before the text."""
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            ids, embedded = kwargs.pop("input_ids", None), kwargs.get("inputs_embeds")
            if embedded is None:
                embedded = _embedding(model)(ids)
            own = self.embeddings.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
            kwargs["inputs_embeds"] = torch.cat([own, embedded], dim=1)
            labels = kwargs.get("labels")
            if labels is not None:
                kwargs["labels"] = torch.cat([labels.new_full((labels.shape[0], self.tokens), -100), labels], dim=1)
        self._extend_mask(kwargs)
        return kwargs


def attach(model: nn.Module, virtual: Virtual) -> None:
    """Freeze a transformers model and put virtual tokens before every text it is given.

    Raises:
        ValueError: it has virtual tokens already.
    """
    if attached(model) is not None:
        raise ValueError("model has virtual tokens already; nybble.nn.virtual.detach takes them away")
    model.requires_grad_(False)
    model.add_module(ATTRIBUTE, virtual)
    virtual.handle = model.register_forward_pre_hook(_hook, with_kwargs=True)  # type: ignore[assignment]


def attached(model: nn.Module) -> Virtual | None:
    """The model's virtual tokens, if it has any."""
    found = model._modules.get(ATTRIBUTE)
    return found if isinstance(found, Virtual) else None


def detach(model: nn.Module) -> None:
    """Take the virtual tokens away."""
    virtual = attached(model)
    if virtual is not None:
        virtual.handle.remove()  # type: ignore[operator,union-attr]
        delattr(model, ATTRIBUTE)


def _hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    virtual = attached(model)
    if virtual is None:
        return args, kwargs
    if args:
        kwargs = {"input_ids": args[0], **kwargs}
        if len(args) > 1:
            raise TypeError("with virtual tokens, a model takes keyword arguments after input_ids")
    return (), virtual.change(model, dict(kwargs))


def _embedding(model: Any) -> nn.Embedding:
    return model.get_input_embeddings()


def attention_sizes(model: Any) -> tuple[int, int, int]:
    """(layers, key and value heads, size of a head) of a transformers model."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim
