"""Keys and values of what a model has read, in memory that is allocated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class SlotLayer(DynamicLayer):
    """A layer's keys and values in a buffer with room for more, into which new ones are written in place.

    transformers' own layer copies all it has at every token.

    Attributes:
        key_slots, value_slots: [B, heads, front + capacity, head_dim]; None before the first update. Slots before
            `front` are for others (a prefix); `keys` and `values` are views of those that follow and are filled.
        front: slots before the text's first.
    """

    def __init__(self, capacity: int, front: int = 0) -> None:
        super().__init__()
        self.front, self.capacity, self.length = front, capacity, 0
        self.key_slots: Tensor | None = None
        self.value_slots: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_slots, self.value_slots = self._new(key_states), self._new(value_states)
        self.is_initialized = True
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.key_slots is not None and self.value_slots is not None
        self.reserve(key_states.shape[2])
        place = slice(self.front + self.length, self.front + self.length + key_states.shape[2])
        self.key_slots[:, :, place] = key_states
        self.value_slots[:, :, place] = value_states
        self.length += key_states.shape[2]
        return self._show()

    def reserve(self, count: int) -> None:
        """Room for `count` more; the buffer at least doubles when it must grow."""
        if self.length + count <= self.capacity:
            return
        self.capacity = max(self.length + count, 2 * self.capacity)
        assert self.key_slots is not None and self.value_slots is not None
        for name in ("key_slots", "value_slots"):
            old = getattr(self, name)
            new = self._new(old)
            new[:, :, : self.front + self.length] = old[:, :, : self.front + self.length]
            setattr(self, name, new)
        self._show()

    def filled(self, length: int) -> None:
        """So many slots of every row are filled now, by somebody else."""
        self.length = length
        self._show()

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= abs(tokens_to_remove)
        if self.is_initialized:
            self._show()

    def reset(self) -> None:
        self.length = 0
        self.key_slots = self.value_slots = self.keys = self.values = None
        self.is_initialized = False

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.key_slots is not None and self.value_slots is not None:
            self.key_slots, self.value_slots = self.key_slots[indices], self.value_slots[indices]
            self._show()

    def _new(self, like: Tensor) -> Tensor:
        return like.new_zeros(like.shape[0], like.shape[1], self.front + self.capacity, like.shape[3])

    def _show(self) -> tuple[Tensor, Tensor]:
        assert self.key_slots is not None and self.value_slots is not None
        filled = slice(self.front, self.front + self.length)
        self.keys, self.values = self.key_slots[:, :, filled], self.value_slots[:, :, filled]
        return self.keys, self.values


def make_cache(config: Any, capacity: int, front: int = 0) -> DynamicCache:
    """A cache for a model with this configuration, with room for `capacity` tokens a row and `front` slots before them.

    Layers of other kinds (sliding windows, recurrent states) are transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [SlotLayer(capacity, front) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_plain(cache: Any) -> bool:
    """Whether every layer's cache is a `SlotLayer`: all that was read is there, and can be taken back."""
    return bool(cache.layers) and all(isinstance(layer, SlotLayer) for layer in cache.layers)


def is_recurrent(cache: Any) -> bool:
    """Whether a layer keeps a state that every token changes, so that padding before a text would."""
    return any(cache.is_linear)


def crop(cache: Any, length: int) -> None:
    """Forget all but the first `length` tokens. Only of a plain cache."""
    for layer in cache.layers:
        layer.crop(layer.length - length)


def memory(cache: Any) -> int:
    """Bytes of a plain cache's buffers."""
    slots = [s for layer in cache.layers for s in (layer.key_slots, layer.value_slots) if isinstance(s, torch.Tensor)]
    return sum(s.numel() * s.element_size() for s in slots)
