"""One token a row through a model of a known build, in nybble's kernels alone.

A model's own forward makes masks, tables and copies in hundreds of small operations, which for one token take longer
than its weights. Here the step is a list of calls on buffers that are there already.

A build is known by its modules' names (Llama's and those of its many likes), and by what it computes: a small random
model of the same class and settings is run by its own forward and by this file's, and a model whose results differ in
any way but by rounding keeps its own forward. Whatever stands in a linear layer's place (LoRA, DoRA, bottlenecks, any
module) is called as it is; LoRA over a quantized layer is computed in its kernel's pass.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _core, ops
from ..backends import decoding
from ..backends.addresses import DTYPE_CODES
from ..backends.elementwise import ACTIVATIONS
from ..backends.weight import PLAIN, BoundWeight, handle_of
from ..nn.factors import LoRA
from ..nn.linear import QuantLinear
from ..nn.lora import LoRALinear
from ..nn.virtual import ATTRIBUTE, VirtualTokens

_CLOSE = 1e-4
"""In fp32, of the largest logit: far above what roundings do, far below any other formula."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS_OF_HEADS = ("q_norm", "k_norm")
_MLP = ("gate_proj", "up_proj", "down_proj")
_FIXED_TABLES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose table of a position does not depend on how far the text goes."""
_TABLE = 64
"""Positions whose rotary tables are computed together."""


class Build:
    """The modules of a model of the known build, and the two things that names do not tell.

    Attributes:
        offset: added to the weights of norms. activation: of the gated MLPs.
    """

    def __init__(self, model: Any, offset: float, activation: str) -> None:
        decoder = model.model
        self.embed, self.layers, self.norm = decoder.embed_tokens, list(decoder.layers), decoder.norm
        self.rotary, self.head = decoder.rotary_emb, model.lm_head
        self.offset, self.activation = offset, activation
        self.dtype = self.norm.weight.dtype


def build_of(model: Any) -> Build | None:
    """The build of a model on the CPU, if it is the known one and its small likeness computes the same; else None."""
    if not _looks_known(model):
        return None
    found = _proven(type(model), model.config, _classes(model))
    return None if found is None else Build(model, *found)


# ---- recognizing -----------------------------------------------------------------------------------------------------


def _looks_known(model: Any) -> bool:
    decoder: Any = getattr(model, "model", None)
    if not isinstance(decoder, nn.Module) or set(model._modules) != {"model", "lm_head"}:
        return False
    if set(decoder._modules) - {ATTRIBUTE} != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return False
    virtual = decoder._modules.get(ATTRIBUTE)
    hooks = [*decoder._forward_hooks.values(), *decoder._forward_pre_hooks.values()]
    if any(not isinstance(getattr(hook, "__self__", None), VirtualTokens) for hook in hooks):
        return False
    if virtual is None and hooks:
        return False
    layers: Any = decoder.layers
    if not isinstance(layers, nn.ModuleList) or not len(layers) or len(layers) != model.config.num_hidden_layers:
        return False
    rotary: Any = decoder.rotary_emb
    if not (_plain(model) and "forward" not in decoder.__dict__ and _plain(rotary)):
        return False
    dtype = getattr(decoder.norm, "weight", torch.empty(0, dtype=torch.int8)).dtype
    tensors = itertools.chain(model.parameters(), model.buffers())
    if (
        dtype not in DTYPE_CODES
        or dtype not in _dtypes(decoder.embed_tokens)
        or not all(t.is_cpu and type(t) in PLAIN for t in tensors)
    ):
        return False
    return _is_norm(decoder.norm, dtype) and all(_is_layer(layer, dtype) for layer in layers)


def _dtypes(embed: Any) -> tuple[Any, Any]:
    """What an embedding gives: the dtype of its weight, or, of a quantized one, what it says."""
    return getattr(getattr(embed, "weight", None), "dtype", None), getattr(embed, "dtype", None)


def _is_layer(layer: nn.Module, dtype: torch.dtype) -> bool:
    parts = layer._modules
    if set(parts) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention, mlp = parts["self_attn"], parts["mlp"]
    if attention is None or mlp is None or set(mlp._modules) - {"act_fn"} != set(_MLP):
        return False
    norms = set(attention._modules) - set(_ATTENTION)
    if not set(_ATTENTION) <= set(attention._modules) or norms not in (set(), set(_NORMS_OF_HEADS)):
        return False
    known = all(_plain(module) and not module._parameters for module in (layer, attention, mlp))
    numbers = isinstance(getattr(attention, "head_dim", None), int) and isinstance(
        getattr(attention, "scaling", None), float
    )
    own = [parts["input_layernorm"], parts["post_attention_layernorm"], *(attention._modules[n] for n in norms)]
    return known and numbers and all(_is_norm(norm, dtype) for norm in own)


def _is_norm(module: Any, dtype: torch.dtype) -> bool:
    weight = module._parameters.get("weight")
    one = len(module._parameters) == 1 and not module._modules and weight is not None and weight.dim() == 1
    one = one and weight.is_contiguous()
    return one and weight.dtype == dtype and _eps(module) is not None and _plain(module)


def _eps(module: Any) -> Any:
    names = ("variance_epsilon", "eps")
    return next((module.__dict__[n] for n in names if isinstance(module.__dict__.get(n), float)), None)


def _plain(module: nn.Module) -> bool:
    """Whether nobody listens to a module's calls or has replaced its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return "forward" not in module.__dict__ and not any(hooks)


def _classes(model: Any) -> frozenset[Any]:
    """The classes of all modules that are computed here and not called; of activations that are functions, those."""
    decoder = model.model
    found: list[Any] = [decoder, decoder.norm, decoder.rotary_emb]
    for layer in decoder.layers:
        norms = (layer.self_attn._modules.get(name) for name in _NORMS_OF_HEADS)
        found += [layer, layer.self_attn, layer.mlp, layer.mlp.act_fn, layer.input_layernorm, *norms]
        found.append(layer.post_attention_layernorm)
    return frozenset(type(part) if isinstance(part, nn.Module) else part for part in found)


_known: dict[tuple[Any, ...], tuple[float, str] | None] = {}


def _proven(kind: type, config: Any, classes: frozenset[Any]) -> tuple[float, str] | None:
    """(offset, activation) with which this file computes what models of this class and configuration do, whose modules
    are of these classes; or None."""
    key = (kind, config.to_json_string(), classes)
    if key not in _known:
        try:
            _known[key] = _try(kind, config, classes)
        except Exception:  # a class that wants something else; that is no reason to fail
            _known[key] = None
    return _known[key]


def _try(kind: Any, config: Any, classes: frozenset[Any]) -> tuple[float, str] | None:
    small = _small_config(config)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(0)
        model = kind(small).float().eval()
        for parameter in model.parameters():
            spread = 0.1 if parameter.dim() == 1 else 1.0
            parameter.add_(torch.randn_like(parameter).mul_(spread / max(1, parameter.shape[-1]) ** 0.5))
        if not _looks_known(model) or _classes(model) != classes:
            return None
        texts = torch.randint(model.config.vocab_size, (2, 9))
        pads = [0, 3]
        expected = [
            model(input_ids=texts[i : i + 1, pad:], use_cache=False).logits[0, -4:] for i, pad in enumerate(pads)
        ]
        wanted = torch.stack(expected, 1)  # [steps, rows, vocabulary]
        for offset, activation in itertools.product((0.0, 1.0), ACTIVATIONS):
            actual = _steps(model, Build(model, offset, activation), texts, pads)
            if bool((actual - wanted).abs().max() <= _CLOSE * wanted.abs().max()):
                return offset, activation
    return None


def _steps(model: Any, build: Build, texts: Tensor, pads: list[int]) -> Tensor:
    """fp32 [4, rows, vocabulary]: logits of the last tokens of the texts, the last three by this file's steps."""
    from .decoder import Batch, ModelTraits

    batch = Batch(ModelTraits(model), [None] * len(pads), texts.shape[1])
    read = texts.shape[1] - 3
    logits = [batch.read([texts[i, pad:read].tolist() for i, pad in enumerate(pads)], 1 << 20)]
    lean = LeanStep(build, batch)
    for place in range(read, texts.shape[1]):
        logits.append(lean(texts[:, place].tolist()).clone())
        batch.length += 1
    return torch.stack(logits)


def _small_config(config: Any) -> Any:
    """A configuration of the same model with few and small layers. Heads keep their width, as rotary tables have it."""
    small = copy.deepcopy(config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    small.num_key_value_heads = min(2, kv_heads)
    small.num_attention_heads = small.num_key_value_heads * min(2, heads // kv_heads)
    small.hidden_size, small.intermediate_size = small.num_attention_heads * width, 48
    small.num_hidden_layers, small.vocab_size = min(2, config.num_hidden_layers), 32
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    if getattr(config, "layer_types", None):
        small.layer_types = list(config.layer_types[: small.num_hidden_layers])
    small._attn_implementation = config._attn_implementation.removeprefix("nybble_")
    return small


# ---- a step ----------------------------------------------------------------------------------------------------------

Call = Callable[[], Any]


class LeanStep:
    """A batch's steps. To be made anew when rows leave the batch or its cache has moved."""

    def __init__(self, build: Build, batch: Any) -> None:
        """Takes over a batch that has been read: `enter` must have been called for it."""
        self.build, self.batch = build, batch
        self.count, dtype = len(batch.rows), build.dtype
        self._keep: list[Any] = []  # what calls hold addresses of
        cache = batch.cache.layers
        self._front = cache[0].front + max(batch.prompts)
        firsts = [
            self._front + pad - prompt - prefix
            for pad, prompt, prefix in zip(batch.pads, batch.prompts, batch.prefixes, strict=True)
        ]
        self._first = torch.tensor(firsts)
        self._shift = torch.tensor(
            [[a + b - pad] for a, b, pad in zip(batch.prefixes, batch.prompts, batch.pads, strict=True)]
        )
        attention = build.layers[0].self_attn
        self._hidden = torch.empty(self.count, build.norm.weight.shape[0], dtype=dtype)
        self._tables = [torch.empty(self.count, attention.head_dim, dtype=dtype) for _ in range(2)]
        self._ahead: tuple[int, Tensor, Tensor] | None = None
        self._calls: list[tuple[list[Call], Callable[[int], None], list[Call]]] = []
        residual: Tensor | None = None
        for layer, slots in zip(build.layers, cache, strict=True):
            residual = self._layer(layer, slots, residual)
        self._end: list[Call] = [] if residual is None else [partial(self._hidden.add_, residual)]
        normed = self._norm(build.norm, self._hidden, self._end)
        self._logits = self._linear(build.head, normed, self._end, torch.float32)

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Logits after one more token of each row, fp32 [B, vocabulary]; overwritten by the next call."""
        self._hidden.copy_(self.build.embed(torch.tensor(tokens)[:, None])[:, 0])
        slot = self._front + self.batch.length
        self._turn(self.batch.length)
        for before, attend, after in self._calls:
            for call in before:
                call()
            attend(slot)
            for call in after:
                call()
        for call in self._end:
            call()
        return self._logits

    def _turn(self, length: int) -> None:
        """The rotary tables of the next token's position."""
        rotary: Any = self.build.rotary
        count = _TABLE if getattr(rotary, "rope_type", "default") in _FIXED_TABLES else 1
        if self._ahead is None or not 0 <= length - self._ahead[0] < self._ahead[1].shape[1]:
            positions = torch.arange(length, length + count)[None] + self._shift
            self._ahead = (length, *rotary(self._hidden[:, None], positions))
        start, *tables = self._ahead
        for own, table in zip(self._tables, tables, strict=True):
            own.copy_(table[:, length - start])

    # ---- making the calls --------------------------------------------------------------------------------------------

    def _layer(self, layer: Any, slots: Any, residual: Tensor | None) -> Tensor:
        """Adds a layer's calls; gives what is to be added to the hidden states after it."""
        attention, mlp, hidden, count = layer.self_attn, layer.mlp, self._hidden, self.count
        before: list[Call] = [] if residual is None else [partial(hidden.add_, residual)]
        normed = self._norm(layer.input_layernorm, hidden, before)
        depth = attention.head_dim
        heads = []
        for name in ("q", "k", "v"):
            projected = self._linear(getattr(attention, f"{name}_proj"), normed, before).view(count, -1, depth)
            norm: Any = attention._modules.get(f"{name}_norm")
            heads.append(projected if norm is None else self._norm(norm, projected, before))
        mixed = self._empty(count, heads[0].shape[1], depth)
        query, key, value = heads
        table = self._tables[0], self._tables[1]
        attend = decoding.attention_step(
            query, key, value, table, slots.key_slots, slots.value_slots, self._first, attention.scaling, mixed
        )
        self._keep += [slots.key_slots, slots.value_slots]
        after: list[Call] = []
        output = self._linear(attention.o_proj, mixed.view(count, -1), after)
        after.append(partial(hidden.add_, output))
        normed = self._norm(layer.post_attention_layernorm, hidden, after)
        gate, up = self._linear(mlp.gate_proj, normed, after), self._linear(mlp.up_proj, normed, after)
        acted = self._gated(gate, up, after)
        down = self._linear(mlp.down_proj, acted, after)
        self._calls.append((before, attend, after))
        return down

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.empty(shape, dtype=dtype or self.build.dtype)
        self._keep.append(made)
        return made

    def _norm(self, norm: Any, x: Tensor, calls: list[Call]) -> Tensor:
        out, width = self._empty(*x.shape), x.shape[-1]
        rows, weight = x.numel() // width, norm.weight.detach()
        rstd = self._empty(rows, dtype=torch.float32)
        code = DTYPE_CODES[x.dtype]
        self._keep.append(weight)
        calls.append(
            partial(
                _core.rms_norm, x.data_ptr(), width, code, rows, width, weight.data_ptr(), code, self.build.offset,
                _eps(norm), out.data_ptr(), code, rstd.data_ptr(), torch.get_num_threads(),
            )
        )  # fmt: skip
        return out

    def _gated(self, gate: Tensor, up: Tensor, calls: list[Call]) -> Tensor:
        out, (rows, width) = self._empty(*gate.shape), gate.shape
        calls.append(
            partial(
                _core.gated, ACTIVATIONS[self.build.activation], gate.data_ptr(), width, up.data_ptr(), width,
                DTYPE_CODES[gate.dtype], rows, width, out.data_ptr(), torch.get_num_threads(),
            )
        )  # fmt: skip
        return out

    def _linear(self, module: Any, x: Tensor, calls: list[Call], dtype: torch.dtype | None = None) -> Tensor:
        """The output of a linear layer, or of what stands in its place, for x [B, in]. dtype: of the output, where the
        layer can give another than x's."""
        if _plain(module):
            if type(module) is QuantLinear:
                return self._quantized(module, x, calls)
            if type(module) is LoRALinear and _plain(module.base):
                out = self._low_rank(module, x, calls)
                if out is not None:
                    return out
            if self._is_dense(module, x):
                out = self._empty(self.count, module.weight.shape[0], dtype=dtype)
                self._dense(x, module.weight, module.bias, out, calls)
                return out
        return self._called(module, x, calls, dtype)

    def _is_dense(self, module: Any, x: Tensor) -> bool:
        return type(module) is nn.Linear and module.weight.dtype == x.dtype and self.count <= decoding.MOST_ROWS

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, calls: list[Call]) -> None:
        weight = weight.detach().contiguous()
        self._keep += [weight, bias]
        calls.append(decoding.dense(x, weight, bias, out))

    def _called(self, module: Any, x: Tensor, calls: list[Call], dtype: torch.dtype | None) -> Tensor:
        """The module's own forward, for a text of one token."""
        text = x[:, None]
        out = self._empty(self.count, module(text).shape[-1], dtype=dtype)
        calls.append(lambda: out.copy_(module(text)[:, 0]))
        return out

    def _quantized(
        self, layer: QuantLinear, x: Tensor, calls: list[Call], side: Tensor | None = None, right: Tensor | None = None
    ) -> Tensor:
        weight, bias = layer.operands()
        out = self._empty(self.count, layer.out_features)
        handle = handle_of(weight if isinstance(weight, BoundWeight) else BoundWeight(*weight), _core)
        self._keep += [handle, weight, bias, side, right]
        if weight.outlier_threshold:  # which columns are outliers is found in every call
            calls.append(lambda: out.copy_(ops.linear(x, weight, bias, side, right)))
            return out
        calls.append(
            partial(
                _core.linear, handle, False, weight.compute, x.data_ptr(), x.shape[1], self.count,
                DTYPE_CODES[x.dtype],
                *((0, 0, 0, 0, 0) if side is None or right is None else (
                    side.data_ptr(), DTYPE_CODES[side.dtype], right.data_ptr(), DTYPE_CODES[right.dtype], side.shape[1]
                )),
                0 if bias is None else bias.data_ptr(), 0 if bias is None else DTYPE_CODES[bias.dtype],
                out.data_ptr(), torch.get_num_threads(),
            )
        )  # fmt: skip
        return out

    def _low_rank(self, layer: LoRALinear, x: Tensor, calls: list[Call]) -> Tensor | None:
        """LoRA's update in the pass of its base, that of several adapters masked to their rows; None: not that kind."""
        base: Any = layer.base
        quantized = type(base) is QuantLinear
        if self.count > decoding.MOST_ROWS or not (quantized or self._is_dense(base, x)):
            return None
        names = [self.batch.adapters[i] for i in range(self.count)]
        own: list[Any] = [layer.adapters[n] if n is not None and n in layer.adapters else None for n in names]
        acting = list({id(a): a for a in own if a is not None}.values())
        if not acting:
            return self._linear(base, x, calls)
        if not all(type(a) is LoRA and not a.dora for a in acting):
            return None
        a = torch.cat([adapter.lora_A.detach() for adapter in acting]).contiguous()
        b = torch.cat([adapter.lora_B.detach() for adapter in acting], 1).contiguous()
        ranks = [adapter.r for adapter in acting]
        scales = [[adapter.scaling * (adapter is mine) for adapter in acting] for mine in own]
        mask = torch.tensor(scales).repeat_interleave(torch.tensor(ranks), 1)
        side = self._empty(self.count, a.shape[0], dtype=torch.float32)
        self._keep += [a, b, mask]
        self._dense(x, a, None, side, calls)
        calls.append(partial(side.mul_, mask))
        if quantized:
            return self._quantized(base, x, calls, side, b)
        out, update = (self._empty(self.count, layer.out_features, dtype=torch.float32) for _ in range(2))
        self._dense(x, base.weight, base.bias, out, calls)
        self._dense(side, b, None, update, calls)
        rounded = self._empty(self.count, layer.out_features)
        calls.append(partial(torch.add, out, update, out=rounded))
        return rounded


def enter(batch: Any) -> None:
    """Puts what stands before the texts of a batch that has been read right before each text, without gaps, where the
    kernel sees it: prompts are moved behind the padding, prefixes are written into the slots in front."""
    virtual = batch.traits.virtual()
    longest = max(batch.prompts)
    for number, layer in enumerate(batch.cache.layers):
        begin = layer.front + longest
        for row, (pad, prompt, prefix) in enumerate(zip(batch.pads, batch.prompts, batch.prefixes, strict=True)):
            if pad and prompt:
                for slots in (layer.key_slots, layer.value_slots):
                    own = slots[row, :, begin - prompt : begin].clone()
                    slots[row, :, begin + pad - prompt : begin + pad] = own
            if prefix:
                held: Any = virtual.adapters[batch.adapters[row]]
                start = begin + pad - prompt - prefix
                for slots, values in zip(
                    (layer.key_slots, layer.value_slots), held.keys_and_values(number), strict=True
                ):
                    slots[row, :, start : start + prefix] = values.to(slots.dtype)
