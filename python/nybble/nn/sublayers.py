"""Where a transformer's sublayers end: the modules whose output is added to the residual stream."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ..errors import PatternError
from .names import base_modules, matches, require_matches
from .quantize import read_directly

# The last parts of the names. A model is known by them and not by its class, so that a new one with the usual names
# works; every row was tried on transformers' class.
ATTENTION_ENDS = (
    "self_attn.o_proj",  # Llama, Mistral, Qwen, Gemma, OLMo, Granite, StableLM, SmolLM3, GPT-OSS, ...
    "self_attn.dense",  # Phi
    "self_attn.out_proj",  # OPT, BART, BioGPT
    "encoder_attn.out_proj",  # BART's cross-attention
    "self_attention.dense",  # Falcon, Bloom
    "attention.dense",  # GPT-NeoX, ALBERT
    "attention.o_proj",  # ViT
    "attention.output.dense",  # BERT, RoBERTa, ELECTRA, DeBERTa
    "crossattention.output.dense",  # a BERT that is a decoder
    "attention.out_lin",  # DistilBERT
    "attn.Wo",  # ModernBERT
    "attn.c_proj",  # GPT-2, GPT-BigCode
    "crossattention.c_proj",
    "attn.out_proj",  # GPT-J, CodeGen, MPT
    "attn.attention.out_proj",  # GPT-Neo
    "SelfAttention.o",  # T5
    "EncDecAttention.o",
)
FEED_FORWARD_ENDS = (
    "mlp.down_proj",  # Llama and its like
    "mlp.fc2",  # Phi, ViT
    "fc2",  # OPT, BART, BioGPT
    "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon, Bloom
    "output.dense",  # BERT, RoBERTa, ELECTRA, DeBERTa; there attention.output.dense is the attention's
    "ffn_output",  # ALBERT
    "ffn.lin2",  # DistilBERT
    "mlp.Wo",  # ModernBERT
    "mlp.c_proj",  # GPT-2, GPT-BigCode, StarCoder2
    "mlp.fc_out",  # GPT-J, CodeGen
    "ffn.down_proj",  # MPT
    "DenseReluDense.wo",  # T5
)
MIXTURES = ("mlp", "block_sparse_moe")
"""Modules that end a sublayer themselves where they hold `experts`: Mixtral, Qwen-MoE, GPT-OSS."""

_LAYER = re.compile(r"(?:^|.*\.)(\d+)(?=\.)")


@dataclass
class Sublayers:
    """Names of the modules that end the attention and the feed-forward sublayers, in the model's order."""

    attention: list[str] = field(default_factory=list)
    feed_forward: list[str] = field(default_factory=list)


def find_sublayers(model: nn.Module) -> Sublayers:
    """The ends of the model's sublayers by their names; empty lists where there are none.

    Only modules inside numbered layers count. A layer has one feed-forward: what lies inside a mixture of experts is
    no end, the mixture is.
    """
    modules: dict[str, nn.Module] = {}
    for name, _, module in base_modules(model):
        modules.setdefault(name, module)
    mixtures = [
        name
        for name, module in modules.items()
        if _ends(name, MIXTURES) and any(f"{name}.{inner}" in modules for inner in ("experts", "gate", "router"))
    ]
    inside = tuple(f"{name}." for name in mixtures)
    found = Sublayers()
    for name in modules:
        if _layer_of(name) is None or (inside and name.startswith(inside)):
            continue
        if _ends(name, ATTENTION_ENDS):
            found.attention.append(name)
        elif name in mixtures or _ends(name, FEED_FORWARD_ENDS):
            found.feed_forward.append(name)
    return found


def adapter_places(model: nn.Module, placement: str, target: Iterable[str] | None) -> list[str]:
    """Names of the modules behind which adapters go.

    Args:
        placement: "houlsby" (after attention and feed-forward) or "pfeiffer" (after the feed-forward).
        target: instead, name patterns (`nybble.formats.match_module`) of any modules that return a tensor, or a
            tuple that begins with it.

    Raises:
        PatternError: a pattern matches nothing, or the model's sublayers are not known and no pattern is given.
        ValueError: a pattern names a module whose output no adapter can change.
    """
    modules = {name: module for name, _, module in base_modules(model) if name}
    if target is not None:
        patterns = tuple(target)
        require_matches("target", patterns, modules)
        places = [name for name in modules if matches(name, patterns)]
    else:
        found = find_sublayers(model)
        places = found.feed_forward + (found.attention if placement == "houlsby" else [])
        problem = _missing(modules, found, placement)
        if problem:
            raise PatternError(
                f"{type(model).__name__}: {problem}; give target, name patterns of the modules that end its sublayers "
                "(what each returns is then added to the residual stream)"
            )
        order = {name: number for number, name in enumerate(modules)}
        places.sort(key=order.__getitem__)
    direct = read_directly(model)
    for name in places:
        if name in direct:
            raise ValueError(f"target: no adapter can stand behind {name}: {direct[name]}")
    return places


def _missing(modules: dict[str, nn.Module], found: Sublayers, placement: str) -> str | None:
    """What is wrong with the sublayers that were found, if anything."""
    if not found.feed_forward:
        return "the ends of its feed-forward sublayers are not known"
    if placement == "houlsby" and not found.attention:
        return "the ends of its attention sublayers are not known"
    covered = {_layer_of(name) for name in found.feed_forward}
    stacks = {layer.rpartition(".")[0] for layer in covered if layer is not None}
    layers = {layer for name in modules if (layer := _layer_of(f"{name}.x")) and layer.rpartition(".")[0] in stacks}
    # T5 numbers what is inside a block too; what counts is that every block has its feed-forward.
    bare = sorted(
        layer for layer in layers - covered if not any(inner and inner.startswith(f"{layer}.") for inner in covered)
    )
    if bare and not any(_inside_numbered(layer) for layer in bare):
        return f"no feed-forward sublayer is known in {bare[0]}"
    return None


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _layer_of(name: str) -> str | None:
    """The numbered layer that a module is in: "model.layers.3" of "model.layers.3.mlp.down_proj"."""
    match = _LAYER.match(name)
    return None if match is None else match.group(0)


def _inside_numbered(layer: str) -> bool:
    """Whether a numbered layer lies inside another."""
    return _layer_of(layer) is not None
