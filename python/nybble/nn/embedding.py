"""Low-rank updates of embeddings, as PEFT has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapters import DEFAULT, Adapted, by_rows
from .factors import EmbeddingLoRA


class LoRAEmbedding(Adapted):
    """y = base(ids) + scaling * (B A)^T [ids] for the adapter that acts; only the As and Bs are trained.

    A head that is tied to the embedding goes on using the base's table.

    Attributes:
        base: the frozen nn.Embedding.
        adapters: name -> `EmbeddingLoRA` with lora_A [r, num_embeddings], zero at the start, and lora_B
            [embedding_dim, r], normal.
    """

    def __init__(self, base: nn.Embedding) -> None:
        """Without an adapter yet; use `from_base`."""
        super().__init__()
        if not isinstance(base, nn.Embedding):
            raise TypeError(f"base is a {type(base).__name__}; an nn.Embedding is needed")
        self.base = base.requires_grad_(False)
        self.train(base.training)

    @classmethod
    def from_base(
        cls,
        base: nn.Embedding,
        r: int,
        alpha: float,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
        name: str = DEFAULT,
    ) -> LoRAEmbedding:
        """Puts an update of rank `r` beside `base`; the arguments are those of `LoRALinear.from_base`."""
        layer = cls(base)
        layer.add(name, r, alpha, rslora, dtype)
        layer.selection.active = name
        return layer

    def add(
        self, name: str, r: int, alpha: float, rslora: bool = False, dtype: torch.dtype = torch.float32
    ) -> EmbeddingLoRA:
        """Puts one more update beside the base, which acts once it is chosen.

        Raises:
            TypeError, ValueError: an argument that is not allowed, by name; the name is taken.
        """
        rows, columns, device = self.base.num_embeddings, self.base.embedding_dim, self.base.weight.device
        adapter = EmbeddingLoRA(rows, columns, r, alpha, rslora=rslora, dtype=dtype, device=device)
        self.put(name, adapter.train(self.training))
        return adapter

    @property
    def weight(self) -> Tensor:
        """The base's table, [num_embeddings, embedding_dim], without the update."""
        return self.base.weight

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.base.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.base.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        """The token whose row is not trained."""
        return self.base.padding_idx

    def unwrapped(self) -> nn.Module:
        """The base."""
        return self.base

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., embedding_dim] in the base's dtype; with an adapter for each row, ids [rows, ...]."""
        self.watch_recomputation()
        selection = self.selection
        if selection.rows is None:
            return self._alone(selection.active, ids)
        selection.check_rows(ids, "LoRAEmbedding")
        return by_rows(ids, selection.groups(self.adapters), self._alone, selection)

    def _alone(self, name: str | None, ids: Tensor) -> Tensor:
        y = self.base(ids)
        if name is None or name not in self.adapters:
            return y
        adapter: Any = self.adapters[name]
        low = functional.embedding(ids, adapter.lora_A.T, padding_idx=self.base.padding_idx)
        return y + (functional.linear(low, adapter.lora_B) * adapter.scaling).to(y.dtype)
