"""Mean loss over rows, perplexity over fixed windows of a text."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..nn.lean_products import lean_products
from .data.rows import IGNORE, Rows
from .distributed.world import ALONE, World
from .evaluating import evaluating
from .loss import CausalLoss


def perplexity_of(loss: float) -> float:
    """exp(loss), loss in nats per token; infinite where float64 cannot hold it."""
    return math.exp(loss) if loss < 709.0 else math.inf


def perplexity(
    model: nn.Module,
    tokens: Tensor | list[int],
    window: int = 512,
    *,
    batch_size: int = 1,
    chunk: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """exp of the mean -log p over the predicted tokens of `tokens` [n], cut into non-overlapping windows.

    Each window is seen alone, so its first token is not predicted: window - 1 predictions each. An incomplete last
    window is left out, as is usual, so that every prediction has the same range of context lengths. The model keeps
    its own dtypes and is left in the mode (train or eval) it was in. progress(done, windows) follows each batch.

    Raises ValueError when there is not one whole window or a window is longer than the model's context.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.int64).flatten()
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    check_length(model, window, "window")
    count = tokens.numel() // window
    if count == 0:
        raise ValueError(
            f"tokens: {tokens.numel()} are fewer than one window of {window}; give more text or a smaller one"
        )
    rows = tokens[: count * window].view(count, window)
    return perplexity_of(mean_loss(model, rows, batch_size=batch_size, chunk=chunk, progress=progress))


def mean_loss(
    model: nn.Module,
    rows: Rows | Tensor,
    *,
    batch_size: int = 1,
    chunk: int = 256,
    progress: Callable[[int, int], None] | None = None,
    loss: CausalLoss | None = None,
    world: World = ALONE,
) -> float:
    """Mean -log p (nats) over the targets of `rows` that count, in eval mode and without gradients.

    rows: `Rows`, or int64 [n, T], plain windows of which every token but the first is predicted. loss: the model's, if
    there is one already. world: the processes among which every batch is divided.

    Raises ValueError when there is no row, or a token that the model does not have.
    """
    if isinstance(rows, Tensor):
        rows = Rows.windows(rows)
    if not len(rows):
        raise ValueError("rows is empty; at least one row is needed")
    check_vocabulary(model, rows.ids, "tokens")
    check_vocabulary(model, rows.targets[rows.targets != IGNORE], "targets")
    device = next(model.parameters()).device
    loss = CausalLoss(model, chunk) if loss is None else loss
    total = 0.0
    with evaluating(model), lean_products(), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            stop = min(start + batch_size, len(rows))
            own = world.rows(stop - start)
            # Where there are fewer rows than processes, all take part nevertheless: weights are gathered by all.
            batch = rows.take(range(start, stop))
            batch = batch.part(own.start, own.stop) if own else batch.part(0, 1)
            value = world.run(loss, batch.to(device))
            total += float(value) if own else 0.0
            if progress is not None:
                progress(stop, len(rows))
    return world.sum_of(total) / int(rows.counted.sum())


def check_length(model: nn.Module, length: int, name: str) -> None:
    """Raise ValueError when `length` tokens are more than the model's configuration says it can take."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise ValueError(f"{name}={length} is longer than the model's context (max_position_embeddings={limit})")


def check_vocabulary(model: nn.Module, ids: Tensor, name: str) -> None:
    """Raise ValueError when a token id is outside the model's vocabulary (another model's tokenizer, most often)."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(size, int) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(
            f"{name}: token ids run from {int(ids.min())} to {int(ids.max())}, "
            f"the model's vocabulary has {size}; is it the model's own tokenizer?"
        )
