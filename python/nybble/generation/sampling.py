"""The next token from a row of logits."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .config import GenerationConfig

_MASK = (1 << 64) - 1
_FEW = 256
"""Candidates that are sorted first for top_p: most of the time they are enough, and a whole vocabulary takes ms."""


def choose(logits: Tensor, seen: Collection[int], config: GenerationConfig, index: int, step: int) -> int:
    """The next token.

    Args:
        logits: fp32 [vocabulary], on the CPU; -infinity: never. seen: tokens of the prompt and of the answer so far.
        index: the prompt's place among the prompts. step: tokens of the answer so far.

    Raises:
        ValueError: no logit is a number above -infinity.
    """
    if config.repetition_penalty != 1.0 and seen:
        logits = penalized(logits, seen, config.repetition_penalty)
    best = int(logits.argmax())
    largest = float(logits[best])
    if not largest > -torch.inf or largest == torch.inf:
        raise ValueError(
            f"the model's logits have {largest} as their largest; its weights or an adapter hold NaN or Inf"
        )
    if config.temperature == 0.0:
        return best
    tokens, probabilities = candidates(logits, config)
    cumulative = probabilities.cumsum(0)
    at = uniform(config.seed, index, step) * float(cumulative[-1])
    place = int(torch.searchsorted(cumulative, torch.tensor(at, dtype=cumulative.dtype), right=True))
    return int(tokens[min(place, len(tokens) - 1)])


def penalized(logits: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """A copy of logits [vocabulary] with the repetition penalty on the tokens in `seen`."""
    tokens = torch.tensor(sorted(set(seen)), dtype=torch.int64)
    own = logits[tokens]
    result = logits.clone()
    result[tokens] = torch.where(own > 0, own / penalty, own * penalty)
    return result


def candidates(logits: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """(ids, probabilities) of the tokens that temperature, top_k, top_p and min_p leave: int64 and fp64, not
    normalized; ids ascend unless top_p sorted them."""
    # The largest is taken away before the division: a tiny temperature must not overflow.
    scaled = (logits.double() - logits.max().double()) / config.temperature
    tokens = (scaled > -torch.inf).nonzero()[:, 0]
    scaled = scaled[tokens]
    if 0 < config.top_k < len(tokens):
        least = scaled.topk(config.top_k).values[-1]
        kept = scaled >= least
        tokens, scaled = tokens[kept], scaled[kept]
    probabilities = scaled.exp()
    if config.top_p < 1.0:
        tokens, probabilities = _nucleus(tokens, probabilities, config.top_p)
    if config.min_p > 0.0:
        kept = probabilities >= config.min_p * probabilities.max()
        tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities


def _nucleus(tokens: Tensor, probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens that reach top_p of the sum, likeliest first; of equally likely ones those listed first."""
    total = float(probabilities.sum())
    few = min(_FEW, len(tokens))
    while True:
        kept = probabilities >= probabilities.topk(few).values[-1]
        order = probabilities[kept].sort(descending=True, stable=True)
        cumulative = order.values.cumsum(0)
        if few == len(tokens) or float(cumulative[-1]) >= top_p * total:
            break
        few = min(8 * few, len(tokens))
    # A token stays if those before it do not reach top_p: the first always does.
    count = 1 + int((cumulative[:-1] < top_p * total).sum())
    chosen = order.indices[:count]
    return tokens[kept][chosen], order.values[:count]


def uniform(seed: int, index: int, step: int) -> float:
    """A number in [0, 1) that depends on these three alone: SplitMix64's finalizer (Steele et al. 2014), chained."""
    state = 0
    for value in (seed, index, step):
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / float(1 << 53)
