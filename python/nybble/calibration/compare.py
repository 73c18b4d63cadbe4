"""Two models on the same text: what one loses against the other, and where."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..training.evaluate import check_length, check_vocabulary, perplexity_of

# Logits of so many tokens are held at once, for both models.
_CHUNK = 128


@dataclass(frozen=True)
class LayerError:
    """Relative RMS difference of the hidden states after a block."""

    block: int
    relative_error: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. A is the reference.

    Attributes:
        perplexity_a, perplexity_b: exp of the mean -log p of the text's tokens.
        kl: mean over the tokens of KL(p_A || p_B) of the next-token distributions, in nats.
        kl_99: its 99th percentile: what the worst hundredth of the tokens lose.
        top1: share of the tokens for which both models find the same token the likeliest.
        tokens: predictions that were compared.
        layers: difference after every block, where both models have the same blocks.
    """

    perplexity_a: float
    perplexity_b: float
    kl: float
    kl_99: float
    top1: float
    tokens: int
    layers: list[LayerError] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)

    def write(self, path: Path, names: tuple[str, str] = ("A", "B")) -> list[Path]:
        """Write the figures to `path` (JSON) and, with matplotlib, a plot beside it (.png); returns the files."""
        from ..checkpoint.report import check_report_path
        from ..checkpoint.writer import Staging

        check_report_path(path)
        written = [path]
        with Staging(path.parent) as staging:
            content = {"a": names[0], "b": names[1], **self.to_dict()}
            staging.write(path.name, (json.dumps(content, indent=2) + "\n").encode())
            if self.layers:
                try:
                    picture = self._plot(names)
                except ImportError:
                    picture = b""
                if picture:
                    written.append(path.with_suffix(".png"))
                    staging.write(written[1].name, picture)
            staging.commit()
        return written

    def _plot(self, names: tuple[str, str]) -> bytes:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([row.block for row in self.layers], [row.relative_error for row in self.layers], "o-")
        axes.set_xlabel("block")
        axes.set_ylabel("relative RMS error of the hidden states")
        axes.set_ylim(bottom=0)
        axes.set_title(
            f"{names[1]} against {names[0]}: KL {self.kl:.4f} nats, top-1 {self.top1:.1%}, "
            f"perplexity {self.perplexity_b:.2f} against {self.perplexity_a:.2f}"
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


def compare(
    a: nn.Module,
    b: nn.Module,
    tokens: Tensor | list[int],
    window: int = 512,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare two causal language models of one vocabulary on `tokens` [n], cut into windows that do not overlap.

    Each window is seen alone; the last, incomplete one is left out. The models keep their dtypes, and the modes that
    they are in. Distributions are compared in fp32.

    Raises:
        ValueError: the text has not one whole window, a window is longer than a model's context, token ids lie outside
            a vocabulary, or the vocabularies differ.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.int64).flatten()
    for model, name in ((a, "a"), (b, "b")):
        check_vocabulary(model, tokens, f"tokens (model {name})")
        check_length(model, window, "window")
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    count = tokens.numel() // window
    if not count:
        raise ValueError(f"tokens: {tokens.numel()} are fewer than one window of {window}")
    sums = _Sums()
    with _evaluated(a), _evaluated(b), torch.no_grad():
        for index, row in enumerate(tokens[: count * window].view(count, 1, window)):
            sums.add(_run(a, row), _run(b, row), row[0, 1:])
            if progress is not None:
                progress(index + 1, count)
    return sums.result()


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _run(model: nn.Module, row: Tensor) -> Any:
    return model(input_ids=row.to(next(model.parameters()).device), use_cache=False, output_hidden_states=True)


class _Sums:
    def __init__(self) -> None:
        self.loss = [0.0, 0.0]
        self.kl: list[Tensor] = []
        self.agree = 0
        self.tokens = 0
        self.layers: dict[int, list[float]] = {}

    def add(self, a: Any, b: Any, targets: Tensor) -> None:
        """One window: the models' outputs, and the tokens that follow all but the last of it."""
        if a.logits.shape[-1] != b.logits.shape[-1]:
            raise ValueError(f"the vocabularies differ: {a.logits.shape[-1]} and {b.logits.shape[-1]} tokens")
        for start in range(0, targets.numel(), _CHUNK):
            part = slice(start, min(start + _CHUNK, targets.numel()))
            p, q = (torch.log_softmax(out.logits[0, part].to("cpu", torch.float32), -1) for out in (a, b))
            for which, log in enumerate((p, q)):
                self.loss[which] -= float(log.gather(1, targets[part, None]).sum(dtype=torch.float64))
            self.agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            # Rounding can take a divergence of about nothing below zero.
            self.kl.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
        self.tokens += targets.numel()
        self._add_layers(a.hidden_states or (), b.hidden_states or ())

    def _add_layers(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
        if len(a) != len(b):
            return
        for block, (x, y) in enumerate(zip(a[1:], b[1:], strict=True)):
            x, y = x.to("cpu", torch.float32), y.to("cpu", torch.float32)
            if x.shape != y.shape:
                continue
            sums = self.layers.setdefault(block, [0.0, 0.0])
            sums[0] += float((x - y).square().sum(dtype=torch.float64))
            sums[1] += float(x.square().sum(dtype=torch.float64))

    def result(self) -> Comparison:
        kl = torch.cat(self.kl)
        layers = [LayerError(block, math.sqrt(d / n) if n else 0.0) for block, (d, n) in self.layers.items()]
        return Comparison(
            perplexity_of(self.loss[0] / self.tokens),
            perplexity_of(self.loss[1] / self.tokens),
            float(kl.mean(dtype=torch.float64)),
            float(torch.quantile(kl, 0.99)) if kl.numel() < 1 << 24 else math.nan,
            self.agree / self.tokens,
            self.tokens,
            layers,
        )
