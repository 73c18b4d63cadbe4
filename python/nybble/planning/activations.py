"""What a layer keeps for its backward pass, tensor by tensor, and what a step holds beside it.

The counts are those of nybble's own loop on the CPU: `nn.fused` (RMSNorm, the gated unit and the rotary embedding save
their inputs), `nn.sdpa` (queries, keys, values, output and logsumexp), `ops.lora_linear` and `nn.lora`. A frozen linear
layer saves nothing, one with a trained weight beside it its input. Elsewhere a model's own code runs, whose RMSNorm
saves its input in fp32 and whose gated unit saves the activated gate too.
"""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import Shape
from .work import ACTIVATION, Work, adapted


@dataclass(frozen=True)
class Kept:
    """Tensors that are kept: what they are, bytes for each token, and bytes that do not depend on tokens."""

    what: str
    per_token: float
    fixed: float = 0.0


def tokens_of(method: str, work: Work) -> int:
    """Tokens that go through the layers in a step: prompts are part of the text."""
    return work.batch * (work.seq + (work.tokens if method == "prompt" else 0))


def layer(shape: Shape, method: str, base: str, work: Work) -> list[Kept]:
    """What one layer keeps from its forward pass to its backward pass, its input among it."""
    e, h, f = ACTIVATION, shape.hidden, shape.ffn
    stream = 4 if base == "fp32" else e  # fp32 weights: embeddings and norms are fp32, and so is the residual stream
    updates = method in ("lora", "dora")
    norm = stream if work.kernels else 4
    kept = [Kept(f"inputs of {shape.norms} norms", shape.norms * norm * h), Kept("norms' divisors", 4 * shape.norms)]
    if shape.query_norm:
        kept.append(Kept("queries and keys before their norms", e * (shape.queries + shape.keys)))
    # Experts of a mixture are frozen (nn.mixture): they keep what comes before the gate, and nothing of their input.
    frozen = shape.experts > 0 and method != "full"
    if shape.experts:
        kept.append(Kept("router's shares in fp32, and where each token goes", 3 * 4 * shape.experts))
    if method == "full":  # autocast rounds a norm's fp32 output anew for every projection
        count = 5 if shape.gated else 4
        kept.append(Kept(f"inputs of {count} projections", count * e * h))
    elif updates:
        kept.append(Kept("inputs of the projections", (1 if frozen and not shape.shared else 2) * e * h))
    kept.append(Kept("queries and attention's output", 2 * e * shape.queries))
    if shape.scores:  # transformers' own attention: scores and weights of every head
        seen = work.seq + (work.tokens if method == "prefix" else 0)
        kept.append(Kept(f"{shape.scores} bytes of each score", shape.scores * shape.heads * seen))
        kept.append(Kept("keys and values, for all heads", 2 * e * shape.queries))
    elif method == "prefix":
        # With a mask, transformers repeats keys and values for every query head; the mask is one for all rows.
        longer = (work.seq + work.tokens) / work.seq
        kept.append(Kept("keys and values behind the prefix, for all heads", 2 * e * shape.queries * longer))
        kept.append(Kept("mask", 0, work.seq * (work.seq + work.tokens)))
    else:
        kept.append(Kept("keys and values", 2 * e * shape.keys))
    if not shape.scores:
        kept.append(Kept("logsumexp of the scores", 4 * shape.heads))
    if shape.gated:
        kept.append(Kept("gate and up", 2 * e * f))
        if not work.kernels and not frozen:
            kept.append(Kept("the activated gate", e * f))
    else:
        kept.append(Kept("the activation's input", e * f))
    if method == "full" or updates:
        kept.append(Kept("input of down", e * (shape.shared if frozen else f)))
    if updates:
        layers = [m for m in adapted(shape) if m.count >= shape.layers]
        kept.append(Kept("LoRA's inner values", len(layers) * e * work.rank))
        if method == "dora":
            outputs = sum(m.out_features for m in layers)
            kept.append(Kept("outputs before DoRA's gain", e * outputs))
    if method == "bottleneck":
        kept += [Kept("inputs of both bottlenecks", 2 * e * h), Kept("their middles", 2 * e * work.size)]
    return kept


def not_kept_by_first(shape: Shape, method: str, base: str, work: Work) -> float:
    """Bytes a token that the first layer does not keep, because nothing before them is trained."""
    e, h = ACTIVATION, shape.hidden
    if method in ("lora", "dora", "prefix"):
        return e * h
    if method == "bottleneck":  # all of the first attention
        return e * (h + 2 * shape.queries + 2 * shape.keys) + 4 * shape.heads + 4
    return 0.0


def in_flight(shape: Shape, method: str, base: str, work: Work) -> float:
    """Bytes a token of gradients on their way at the most, in the gated unit's backward pass: that of its output, those
    of gate and up, and the residual's; the down projection's input is free by then. Where attention keeps its scores,
    it may be theirs: two in fp32 around the softmax, less the weights that are free by then."""
    h = shape.hidden
    stream = 4 if base == "fp32" else ACTIVATION
    if shape.scores:
        return max(_in_flight_of_ffn(shape, method, base, work), 6 * shape.heads * work.seq + stream * h)
    return _in_flight_of_ffn(shape, method, base, work)


def _in_flight_of_ffn(shape: Shape, method: str, base: str, work: Work) -> float:
    e, h, f = ACTIVATION, shape.hidden, shape.ffn
    stream = 4 if base == "fp32" else e
    if shape.experts and method != "full":
        # One expert at a time, in fp32 where gradients meet; the sum over experts, and what the router adds to it.
        return e * f * (3 if shape.gated else 2) + (stream + 4 + 3 * e) * h
    freed = e * f if method in ("lora", "dora", "full") else 0
    return e * f * (3 if shape.gated else 2) - freed + stream * h
