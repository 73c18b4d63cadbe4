"""How a transformers model numbers the tokens of a text, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attention import forward_parameters

STYLES = ("count", "mask", "ids")


class Positions:
    """The position ids that a model computes itself when it is given none.

    Attributes:
        style: "count": 0, 1, ...; "mask": those of attention_mask that are set are counted (OPT); "ids": tokens that
            are not the padding token are counted, from the padding token's id + 1 on (RoBERTa); "none": it takes none.
        padding: id of the padding token. causal: a token sees only those before it.
        table: positions that the model has learned; None: any number.
    """

    def __init__(self, style: str, padding: int, causal: bool, table: int | None = None) -> None:
        self.style, self.padding, self.causal, self.table = style, padding, causal, table

    @classmethod
    def of(cls, decoder: nn.Module, run: Callable[..., Tensor]) -> Positions:
        """Finds out with a few short texts.

        Args:
            run: (ids [1, T], attention_mask, position_ids) -> last hidden states.

        Raises:
            ValueError: what the model computes is none of the styles.
        """
        table: Any = decoder.get_input_embeddings()  # type: ignore[operator]  # nn.Module's __getattr__ is typed Tensor | Module
        config: Any = decoder.config
        padding = getattr(config, "pad_token_id", None)
        padding = 0 if padding is None or padding < 0 else padding
        device = table.weight.device
        tokens = [number for number in range(table.weight.shape[0]) if number != padding][:4]
        ids = torch.tensor([tokens], device=device)
        whole = run(ids)
        causal = torch.allclose(run(ids[:, :-1]), whole[:, :-1], rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
        found = cls("none", padding, causal, _table(decoder))
        if "position_ids" not in forward_parameters(decoder):
            return found
        padded = torch.cat([ids.new_full((1, 1), padding), ids[:, 1:]], 1)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        expected = run(padded, attention_mask=mask)
        for style in STYLES:
            found.style = style
            a = run(ids, position_ids=found.default(ids, None, 0))
            b = run(padded, attention_mask=mask, position_ids=found.default(padded, mask, 0).clamp(min=0))
            if all(
                torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
                for one, other in ((a, whole), (b[:, 1:], expected[:, 1:]))
            ):
                return found
        raise ValueError(
            f"{type(decoder).__name__} numbers the tokens of a text in a way that is not known; virtual tokens would "
            "get wrong positions"
        )

    @property
    def begin(self) -> int:
        """Position of a text's first token."""
        return self.padding + 1 if self.style == "ids" else 0

    def default(self, text: Tensor, mask: Tensor | None, past: int) -> Tensor:
        """int64 [1 or B, T]: what the model computes for ids [B, T] or embeddings [B, T, width] after `past` tokens."""
        length, device = text.shape[1], text.device
        if self.style == "mask" and mask is not None and mask.dim() == 2:
            seen = mask.long()
            return (seen.cumsum(1) * seen - 1)[:, past:]
        if self.style == "ids" and text.dim() == 2:
            real = (text != self.padding).long()
            return (real.cumsum(1) + past) * real + self.padding
        return torch.arange(past + self.begin, past + self.begin + length, device=device)[None]

    def shifted(self, inputs: dict[str, Any], text: Tensor, past: int, shift: list[int]) -> Tensor | None:
        """position_ids [..., 1 or B, T] of the text behind `shift` virtual tokens of each row (or of one for all).

        Raises:
            ValueError: rows have different numbers of them, and the model takes no positions.
        """
        if self.style == "none":
            if len(set(shift)) > 1:
                raise ValueError(
                    "rows with different numbers of virtual tokens need a model that takes position_ids; give each row "
                    "as many, or run them apart"
                )
            return None
        given = inputs.get("position_ids")
        positions = self.default(text, inputs.get("attention_mask"), past) if given is None else given
        added = shift[0] if len(set(shift)) == 1 else torch.tensor(shift, device=positions.device)[:, None]
        return positions + added

    def with_prompt(self, positions: Tensor | None, prefixes: list[int], prompts: list[int]) -> Tensor | None:
        """position_ids of the prompts, behind the prefixes, before those of the text."""
        if positions is None:
            return None
        longest = max(prompts)
        rows = [
            [self.begin + before + max(0, j - (longest - own)) for j in range(longest)]
            for before, own in zip(prefixes, prompts, strict=True)
        ]
        front = torch.tensor(rows[:1] if len({*map(tuple, rows)}) == 1 else rows, device=positions.device)
        batch = max(front.shape[0], positions.shape[-2])
        positions = positions.expand(*positions.shape[:-2], batch, -1)
        return torch.cat([front.expand(*positions.shape[:-1], -1), positions], -1)

    def check(self, positions: Tensor | None) -> None:
        """Raises ValueError for a position that the model has not learned."""
        if self.table is not None and positions is not None and not torch.compiler.is_compiling():
            last = int(positions.max())
            if last >= self.table:
                raise ValueError(
                    f"the text with its virtual tokens reaches position {last}; the model has learned {self.table}: "
                    "shorten the text, or take fewer virtual tokens"
                )


def _table(decoder: nn.Module) -> int | None:
    """Positions in a learned table, if the model has one."""
    for name, module in decoder.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in leaf or leaf == "wpe"):
            return module.num_embeddings - getattr(module, "offset", 0)
    return None
