"""Virtual tokens: what prefix tuning and prompt tuning put before the text, by adapter.

One `VirtualTokens` hangs on a transformers model's decoder (or encoder) and acts through its hooks: prompts are
embedded before the text and taken out of the output again, positions of the text start after the virtual tokens.
Prefixes act inside the attention layers (`nybble.nn.prefix`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapters import Adapted, adapted_modules, use_adapter
from .attention import SITE, Configs, evaluated, forward_parameters, is_eager, record, register, run
from .masks import documents, extended, join_masks
from .positions import Positions
from .tokens import decoder_of, embedding, embedding_dtype

ATTRIBUTE = "nybble_virtual"


@dataclass
class Site:
    """Where a prefix gets into an attention layer: the layer's number. `nybble.nn.attention` defines `extend`."""

    virtual: VirtualTokens
    layer: int

    def extend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(key, value, mask) with the prefixes that act in front."""
        virtual = self.virtual
        if not virtual.acts("prefix"):
            return key, value, mask
        virtual.watch_recomputation()
        if options.get("cache") is not None:
            raise RuntimeError("a prefix does not work with continuous batching (paged attention)")
        queries, keys = query.shape[2], key.shape[2]
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        eager = is_eager(module)
        if mask is None and causal and queries > 1 and not eager:
            # What attention without a mask means: causal, and of a longer (static) cache only the first keys count.
            key, value, keys = key[:, :, :queries], value[:, :, :queries], queries
            mask = torch.ones(queries, keys, dtype=torch.bool, device=key.device).tril()[None, None]

        def own(prefix: Any) -> Tensor:
            return torch.stack(prefix.keys_and_values(self.layer)).to(key.dtype)  # [2, heads, tokens, head_dim]

        both, seen = virtual.by_row("prefix", key, own)
        before_keys, before_values = both.unbind(1)
        if mask is not None or seen is not None:
            batch = key.shape[0]
            if mask is None:
                mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=key.device)
            if seen is not None:
                mask = mask.expand(batch, -1, -1, -1)
                front = seen[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
            else:
                front = torch.ones((), dtype=torch.bool, device=key.device)
                front = front.expand(*mask.shape[:-1], both.shape[-2])
            mask = join_masks(front, mask, eager, query.dtype)
        if options.get("position_bias") is not None:
            options["position_bias"] = functional.pad(options["position_bias"], (both.shape[-2], 0))
        return torch.cat([before_keys, key], 2), torch.cat([before_values, value], 2), mask


class VirtualTokens(Adapted):
    """Prefixes and prompts of a model by name.

    Attributes:
        positions: how the model numbers the tokens of a text.
        adapters: name -> `Prefix` or `Prompt`.
    """

    def __init__(self, positions: Positions) -> None:
        super().__init__()
        self.positions = positions
        self._handles: list[Any] = []
        self._layers: list[nn.Module] = []  # with a `Site`; the decoder's own, no submodules of this one
        self._configs: Configs | None = None
        self._inserted: dict[int, int] = {}  # prompt tokens that a forward has begun with, by thread

    # ---- on the model and off it -------------------------------------------------------------------------------------

    def attach(self, decoder: nn.Module) -> None:
        """Hangs this on a model."""
        decoder.add_module(ATTRIBUTE, self)
        self._handles = [
            decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.register_forward_hook(self.after, with_kwargs=True),
        ]

    def reach(self, decoder: nn.Module, layers: list[nn.Module]) -> None:
        """From now on prefixes act in these attention layers of the model."""
        if self._configs is not None:
            return
        self._configs, self._layers = Configs(decoder), layers
        for number, layer in enumerate(layers):
            layer.__dict__[SITE] = Site(self, number)
        self._configs.redirect()

    def removed(self) -> None:
        """The model is as it was before."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.__dict__.pop(SITE, None)
        if self._configs is not None:
            self._configs.restore()
        self._handles, self._layers, self._configs = [], [], None

    def unwrapped(self) -> None:
        """Nothing takes its place."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inserted": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._configs is not None:
            register()

    # ---- which act, row by row ---------------------------------------------------------------------------------------

    def acts(self, kind: str) -> bool:
        """Whether any prefix, or any prompt, acts on any row."""
        return any(name in self.adapters and self.adapters[name].kind == kind for name in self.selection.names)

    def lengths(self, kind: str) -> list[int]:
        """Virtual tokens of this kind of every row; of one row that stands for all where one adapter acts on all."""
        held: Any = self.adapters
        rows = self.selection.rows
        names = (self.selection.active,) if rows is None else rows
        return [held[name].tokens if name in held and held[name].kind == kind else 0 for name in names]

    def by_row(self, kind: str, like: Tensor, value: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor | None]:
        """(value(adapter) [..., tokens, width] for every row, shorter ones padded in front: [B, ..., longest, width],
        bool [B, longest]: which are no padding, None if all). like: a tensor whose first dimension is the batch."""
        selection = self.selection
        if selection.rows is None:
            own = value(self.acting())
            return own.expand(like.shape[0], *own.shape), None
        selection.check_rows(like, "VirtualTokens")
        groups: dict[str | None, list[int]] = {}
        for row, name in enumerate(selection.rows):
            held = name is not None and name in self.adapters and self.adapters[name].kind == kind
            groups.setdefault(name if held else None, []).append(row)
        lengths = {name: 0 if name is None else self._held(name).tokens for name in groups}
        longest = max(lengths.values())
        values = {name: value(self._held(name)) for name in groups if name is not None}
        shape = next(iter(values.values())).shape
        padded = [
            like.new_zeros(*shape[:-2], longest, shape[-1])
            if name is None
            else functional.pad(values[name], (0, 0, longest - lengths[name], 0))
            for name in groups
        ]
        number = {row: i for i, rows in enumerate(groups.values()) for row in rows}
        numbers = selection.constant(
            ("virtual", kind, like.device),
            lambda: torch.tensor([number[row] for row in range(len(number))], device=like.device),
        )
        seen = None
        if len(set(lengths.values())) > 1:
            own_lengths = self.lengths(kind)
            seen = selection.constant(
                ("seen", kind, tuple(own_lengths), like.device),
                lambda: torch.tensor([[j >= longest - n for j in range(longest)] for n in own_lengths]).to(like.device),
            )
        return torch.stack(padded).index_select(0, numbers), seen

    def _held(self, name: str) -> Any:
        return self.adapters[name]

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of the decoder's forward, with the prompts that act before the text."""
        thread = _thread()
        self._inserted.pop(thread, None)
        prefix, prompt = self.acts("prefix"), self.acts("prompt")
        if prefix or self._configs is not None:
            self._redirect()
        if not (prefix or prompt):
            return None
        inputs = {**dict(zip(forward_parameters(decoder), args, strict=False)), **kwargs} if args else dict(kwargs)
        text = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if text is None:
            raise ValueError(f"{type(decoder).__name__} with virtual tokens needs input_ids or inputs_embeds")
        if self.selection.rows is not None:
            self.selection.check_rows(text, "VirtualTokens")
        if prefix:
            _require_gradient(decoder)
        cache = inputs.get("past_key_values")
        cached = 0 if cache is None else cache.get_seq_length()
        prefixes, prompts = self.lengths("prefix"), self.lengths("prompt")
        longest = max(prompts) if prompt else 0
        first = prompt and cached == 0
        shift = [a + b for a, b in zip(prefixes, prompts, strict=True)]
        positions = self.positions.shifted(inputs, text, cached if first else cached - longest, shift)
        if prompt:
            self.watch_recomputation()
            if getattr(cache, "is_compileable", False):
                raise ValueError("a prompt needs a cache that grows (DynamicCache); this one has a fixed size")
            mask = self._prompt_mask(decoder, inputs, text, longest, cached - (0 if first else longest), first)
            if first:
                self._insert(decoder, inputs, text)
                positions = self.positions.with_prompt(positions, prefixes, prompts)
                self._inserted[thread] = longest
            inputs["attention_mask"] = mask
            inputs.pop("cache_position", None)  # transformers 4: it counts the text only, the model counts again
        if positions is not None:
            inputs["position_ids"] = positions
        self.positions.check(positions)
        return (), inputs

    def _redirect(self) -> None:
        if self._configs is not None:
            self._configs.redirect()

    def _insert(self, decoder: nn.Module, inputs: dict[str, Any], text: Tensor) -> None:
        """Puts the prompts' embeddings before the text's."""
        embedded = embedding(decoder)(text) if text.dim() == 2 else text
        own, _ = self.by_row("prompt", embedded, lambda prompt: prompt.embeddings.to(embedded.dtype))
        inputs["input_ids"], inputs["inputs_embeds"] = None, torch.cat([own, embedded], 1)
        types = inputs.get("token_type_ids")
        if types is not None:
            inputs["token_type_ids"] = functional.pad(types, (own.shape[1], 0))

    def _prompt_mask(
        self, decoder: nn.Module, inputs: dict[str, Any], text: Tensor, longest: int, past: int, first: bool
    ) -> Tensor | None:
        """attention_mask with the prompts in front; None stays None where every row has the same number of them."""
        mask, batch, length = inputs.get("attention_mask"), text.shape[0], text.shape[1]
        lengths = self.lengths("prompt")
        seen = None
        if len(set(lengths)) > 1:
            table = [[j >= longest - n for j in range(longest)] for n in lengths]
            seen = torch.tensor(table, device=text.device)
        if mask is None and inputs.get("position_ids") is not None and not _uses_cache(decoder, inputs):
            mask = documents(inputs["position_ids"], batch) if self.positions.causal else None
        if mask is None:
            if seen is None:
                return None
            mask = torch.ones(batch, past + length, dtype=torch.int64, device=text.device)
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
            shown = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            raise ValueError(f"attention_mask has {shown}; with a prompt it must be [B, T] or [B, 1, T, T]")
        if mask.dim() == 2:
            front = mask.new_ones(mask.shape[0], longest) if seen is None else seen.to(mask.dtype)
            return torch.cat([front, mask], 1)
        if first and not self.positions.causal:
            raise ValueError(
                "attention_mask is [B, 1, T, T]; with a prompt, which a bidirectional model lets see the text, it must "
                "be [B, T]"
            )
        seen = torch.ones(1, longest, dtype=torch.bool, device=text.device) if seen is None else seen
        return extended(mask, seen, first, is_eager(decoder), embedding_dtype(decoder))

    def after(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The decoder's output without the prompts' tokens."""
        inserted = self._inserted.pop(_thread(), 0)
        if not inserted:
            return None
        length = kwargs["inputs_embeds"].shape[1]
        if hasattr(output, "to_tuple"):
            for key in list(output.keys()):
                if key not in ("past_key_values", "pooler_output"):
                    output[key] = _stripped(output[key], inserted, length)
            if output.get("pooler_output") is not None:
                output["pooler_output"] = decoder.pooler(output["last_hidden_state"])
            return output
        stripped = _stripped(output, inserted, length)
        if getattr(decoder, "pooler", None) is not None:
            stripped = (stripped[0], decoder.pooler(stripped[0]), *stripped[2:])
        return stripped


def _thread() -> int:
    """The thread that runs; compiled code knows of one only."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _stripped(value: Any, inserted: int, length: int) -> Any:
    """Hidden states [B, length, width] and attentions [B, heads, length, keys] without the first tokens."""
    if isinstance(value, (tuple, list)):
        return type(value)(_stripped(inner, inserted, length) for inner in value)
    dimension = {3: 1, 4: 2}.get(value.dim()) if isinstance(value, Tensor) else None
    return value if dimension is None or value.shape[dimension] != length else value.narrow(
        dimension, inserted, length - inserted
    )  # fmt: skip


def _uses_cache(decoder: Any, inputs: dict[str, Any]) -> bool:
    """Whether a forward has a cache or makes one, as transformers decides it."""
    if inputs.get("past_key_values") is not None:
        return True
    if getattr(decoder, "gradient_checkpointing", False) and decoder.training:
        return False
    use = inputs.get("use_cache")
    return bool(getattr(decoder.config, "use_cache", False) if use is None else use)


def _require_gradient(decoder: Any) -> None:
    """Raises RuntimeError where activation checkpointing would keep the gradient from a prefix."""
    if not (getattr(decoder, "gradient_checkpointing", False) and decoder.training):
        return
    options = getattr(getattr(decoder, "_gradient_checkpointing_func", None), "keywords", {})
    if options.get("use_reentrant", False):
        raise RuntimeError(
            "reentrant activation checkpointing gives a prefix no gradient; turn it on with use_reentrant=False"
        )


# ---- models ----------------------------------------------------------------------------------------------------------


def virtual_tokens(model: nn.Module) -> VirtualTokens | None:
    """The model's virtual tokens, if it has any."""
    return next((m for m in adapted_modules(model).values() if isinstance(m, VirtualTokens)), None)


def prepared(model: nn.Module) -> tuple[nn.Module, VirtualTokens]:
    """(decoder, its virtual tokens): those that it has, or new ones that are not on it yet.

    Raises:
        TypeError, ValueError: it can have none.
    """
    decoder = decoder_of(model)
    present = virtual_tokens(model)
    if present is not None:
        return decoder, present
    if embedding(decoder).weight.is_meta:
        raise ValueError("model is on the meta device: there are no values to compute with")
    with use_adapter(model, None), evaluated(decoder):
        return decoder, VirtualTokens(Positions.of(decoder, lambda ids, **inputs: run(decoder, ids, **inputs)))


def recorded(model: nn.Module, decoder: nn.Module, ids: list[int]) -> list[Any]:
    """What every attention layer of the model, without adapters, computes for a text (`nybble.nn.attention.record`)."""
    weight: Any = embedding(decoder).weight
    with use_adapter(model, None):
        return record(decoder, torch.tensor([ids], device=weight.device))
