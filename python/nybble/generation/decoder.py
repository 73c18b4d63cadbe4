"""A batch of texts inside a model: read at once, then one token a row at a time, by the model's own forward.

This works for every causal model of transformers with whatever layers and adapters are in it. Texts of different
lengths are padded in front, hidden by the mask, and numbered from their own first token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.adapters import Which, adapted_modules, set_adapter, share_selection
from ..nn.lean_products import lean_products
from ..nn.virtual import VirtualTokens, virtual_tokens
from .lean_step import Build, LeanStep, build_of, enter


class ModelTraits:
    """What the loop must know of a model: how its forward is called, what it can hold.

    Attributes:
        context: most tokens of a text; None: any number. vocabulary: rows of the embedding.
        takes: names of the forward's arguments. cache_name: the one that takes the cache.
        recurrent: a state that every token changes; no padding then. plain: every layer's cache can be cut off at the
            end.
    """

    def __init__(self, model: Any) -> None:
        name = type(model).__name__
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_input_embeddings"):
            raise TypeError(f"model is a {name}; a causal language model of transformers is needed")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"model: {name} is an encoder-decoder; generation needs a decoder")
        self.model = model
        self.takes = set(inspect.signature(model.forward).parameters)
        self.cache_name = next((n for n in ("past_key_values", "cache_params") if n in self.takes), "")
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not self.cache_name or head is None:
            what = "has no cache" if head is not None else "gives no logits"
            raise ValueError(f"model: {name} {what}; generation needs a causal language model (...ForCausalLM)")
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        self.device = model.get_input_embeddings().weight.device
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        from .cache import is_plain, is_recurrent, make_cache

        trial = make_cache(config, 1)
        self.recurrent, self.plain = is_recurrent(trial), is_plain(trial)

    def build(self) -> Build | None:
        """How steps of one token can go through nybble's kernels, if the model's build is known, and no autocast or
        dispatch mode wants to see operators."""
        watched = torch.is_autocast_enabled("cpu") or torch._C._len_torch_dispatch_stack() > 0
        return build_of(self.model) if self.plain and not watched else None

    def pads(self, adapters: Sequence[str | None]) -> bool:
        """Whether rows of different lengths can be in one batch. A recurrent state does not know of padding, and a
        window of attention counts what lies between a prompt (of virtual tokens) and the text."""
        return not self.recurrent and (self.plain or not max(_lengths(self.virtual(), "prompt", adapters), default=0))

    def virtual(self) -> VirtualTokens | None:
        """The model's virtual tokens, if it has any."""
        return virtual_tokens(self.model)

    def virtual_lengths(self, adapters: Sequence[str | None]) -> list[int]:
        """Virtual tokens before the text of each row."""
        virtual = self.virtual()
        if virtual is None:
            return [0] * len(adapters)
        held: Any = virtual.adapters
        return [held[name].tokens if name is not None and name in held else 0 for name in adapters]


def which_adapters(adapters: Sequence[str | None]) -> Which:
    """As `set_adapter` takes it: one name where all rows have the same."""
    return adapters[0] if len(set(adapters)) == 1 else tuple(adapters)


class Batch:
    """Rows of text that a model continues.

    Attributes:
        rows: the numbers by which the caller knows the rows that are still there, in the batch's order.
        adapters: of these rows. cache: what they have been read into. length: tokens of the longest row.
    """

    def __init__(
        self, traits: ModelTraits, adapters: Sequence[str | None], capacity: int, build: Build | None = None
    ) -> None:
        """An empty batch: a row for each of `adapters`.

        capacity: most tokens of a row. build: of the model, if steps are to go through nybble's kernels.
        """
        from .cache import make_cache

        self.traits = traits
        self.adapters = list(adapters)
        self.rows = list(range(len(self.adapters)))
        virtual = traits.virtual()
        lengths = _lengths(virtual, "prefix", self.adapters), _lengths(virtual, "prompt", self.adapters)
        self.prefixes, self.prompts = lengths
        self.cache = make_cache(traits.model.config, capacity + max(self.prompts), max(self.prefixes))
        self.length = 0
        self.pads = [0] * len(self.adapters)
        self.capacity = capacity
        self._mask: Tensor | None = None  # bool [B, capacity], None without padding
        self._build = build if self.traits.plain else None
        self._lean: LeanStep | None = None
        self._entered = False  # what stands before the texts has been moved

    # ---- reading -----------------------------------------------------------------------------------------------------

    def read(self, texts: Sequence[Sequence[int]], at_once: int) -> Tensor:
        """Logits after the last token of each row, fp32 [B, vocabulary]. Only the first texts may differ in length.

        at_once: most tokens of all rows together in a forward pass; a recurrent model reads all at once.
        """
        longest = max(map(len, texts))
        self._leave()
        if self.length == 0:
            self.pads = [longest - len(text) for text in texts]
            if any(self.pads):
                self._mask = torch.ones(len(texts), longest, dtype=torch.bool, device=self.traits.device)
                for row, pad in enumerate(self.pads):
                    self._mask[row, :pad] = False
        elif any(len(text) != longest for text in texts):
            raise ValueError("texts that are appended must be of one length")
        ids = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts], device=self.traits.device)
        step = longest if self.traits.recurrent else max(1, at_once // len(texts))
        logits = torch.empty(0)
        for first in range(0, longest, step):
            logits = self._forward(ids[:, first : first + step])
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits after one more token of each row, fp32 [B, vocabulary]; the next call may overwrite them."""
        if self._build is not None:
            return self._lean_step(tokens)
        return self._forward(torch.tensor([[token] for token in tokens], device=self.traits.device))

    def _lean_step(self, tokens: Sequence[int]) -> Tensor:
        assert self._build is not None
        if self._lean is None:
            for layer in self._layers():
                layer.reserve(self.capacity - self.length)
            if not self._entered:
                enter(self)
                self._entered = True
            self._lean = LeanStep(self._build, self)
        logits = self._lean(tokens)
        self.length += 1
        return logits

    def _layers(self) -> list[Any]:
        return self.cache.layers

    def _leave(self) -> None:
        """The model's own forward goes on with what the steps have written."""
        if self._lean is not None:
            for layer in self._layers():
                layer.filled(self.length + max(self.prompts))
            self._lean = None

    def _forward(self, ids: Tensor) -> Tensor:
        traits, count = self.traits, ids.shape[1]
        inputs: dict[str, Any] = {traits.cache_name: self.cache, "use_cache": True}
        if self._mask is not None:
            if self._mask.shape[1] < self.length + count:
                new = self._mask.new_ones(len(self.rows), self.length + count - self._mask.shape[1])
                self._mask = torch.cat([self._mask, new], 1)
            inputs["attention_mask"] = self._mask[:, : self.length + count].long()
        if "position_ids" in traits.takes:
            pads = torch.tensor(self.pads, device=ids.device)[:, None]
            places = torch.arange(self.length, self.length + count, device=ids.device)[None]
            inputs["position_ids"] = (places - pads).clamp_(min=0) if any(self.pads) else places
        if "logits_to_keep" in traits.takes:
            inputs["logits_to_keep"] = 1
        with lean_products():
            output = traits.model(input_ids=ids, **inputs)
        self.length += count
        return output.logits[:, -1].float()

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens of the text. Only of one row, and a plain cache."""
        from .cache import crop

        self._leave()
        crop(self.cache, length + max(self.prompts))
        self.length = length

    # ---- rows --------------------------------------------------------------------------------------------------------

    def drop(self, numbers: Sequence[int]) -> None:
        """Takes the rows with these numbers out; what is left keeps its order. Not all of them."""
        if self.traits.recurrent or len(set(self.prompts)) > 1:
            return  # the cache has as many slots as the longest prompt, which must stay in the batch
        kept = [i for i, number in enumerate(self.rows) if number not in numbers]
        indices = torch.tensor(kept, device=self.traits.device)
        self._leave()
        for layer in self._layers():
            layer.batch_select_indices(indices)
        for name in ("rows", "adapters", "pads", "prefixes", "prompts"):
            setattr(self, name, [getattr(self, name)[i] for i in kept])
        if self._mask is not None:
            self._mask = self._mask[indices]
        set_which(self.traits.model, self.adapters)


def set_which(model: nn.Module, adapters: Sequence[str | None]) -> None:
    """`set_adapter` for the rows of a batch, if the model has adapters."""
    if adapted_modules(model):
        before, which = share_selection(model).which, which_adapters(adapters)
        if before != which:
            set_adapter(model, which)


def _lengths(virtual: VirtualTokens | None, kind: str, adapters: Sequence[str | None]) -> list[int]:
    held: Any = {} if virtual is None else virtual.adapters
    return [held[n].tokens if n is not None and n in held and held[n].kind == kind else 0 for n in adapters]
