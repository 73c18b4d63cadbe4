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

from ..errors import CalibrationError
from ..nn.lean_products import lean_products
from ..training.evaluate import check_length, check_vocabulary, perplexity_of
from .blocks import find_stack

# Logits of so many tokens are held at once, for both models.
_CHUNK = 128


@dataclass(frozen=True)
class LayerError:
    """Relative RMS difference of a block's own output: the hidden states before anything that follows the block."""

    block: int
    relative_error: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. A is the reference.

    Attributes:
        perplexity_a, perplexity_b: exp of the mean -log p of the text's tokens.
        kl: mean over the tokens of KL(p_A || p_B) of the next-token distributions, in nats; infinite where B rules
            out a token that A does not.
        kl_99: its 99th percentile: what the worst hundredth of the tokens lose.
        top1: share of the tokens for which both models find the same token the likeliest.
        tokens: predictions that were compared.
        layers: difference of every block's output, where both models are one stack of as many blocks of one width.
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
        axes.set_ylabel("relative RMS error of the block's output")
        axes.set_ylim(bottom=0)
        a, b = (Path(name).name for name in names)
        axes.set_title(
            f"{b} against {a}\nKL {self.kl:.4f} nats, top-1 {self.top1:.1%}, "
            f"perplexity {self.perplexity_b:.2f} against {self.perplexity_a:.2f}",
            fontsize="medium",
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
    they are in, and may be on different devices. Distributions are compared in fp32, on the CPU.

    Raises:
        ValueError: the text has not one whole window, a window is longer than a model's context, token ids lie outside
            a vocabulary, the vocabularies differ, or a model is not a causal language model. That is tried on two
            tokens, since neither `can_generate()` nor `is_decoder` tells: BertLMHeadModel has the one without being
            causal, Llama is causal without the other.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.int64).to("cpu").flatten()
    for model, name in ((a, "a"), (b, "b")):
        check_vocabulary(model, tokens, f"tokens (model {name})")
        check_length(model, window, "window")
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    count = tokens.numel() // window
    if not count:
        raise ValueError(f"tokens: {tokens.numel()} are fewer than one window of {window}")
    sums = _Sums()
    with _evaluated(a), _evaluated(b), lean_products(), torch.no_grad():
        for model, name in ((a, "a"), (b, "b")):
            _check_causal(model, tokens, name)
        blocks = _blocks(a), _blocks(b)
        for index, row in enumerate(tokens[: count * window].view(count, 1, window)):
            sums.add(_run(a, row, blocks[0]), _run(b, row, blocks[1]), row[0, 1:])
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


def _logits(model: nn.Module, row: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=row.to(next(model.parameters()).device), use_cache=False).logits
    return logits


def _check_causal(model: nn.Module, tokens: Tensor, name: str) -> None:
    """Raise ValueError unless the model makes logits of token ids, the first position's whatever the second token is.

    A mixture's rounding may depend on which tokens share an expert, so what a model that says it generates text may
    differ by is far above an epsilon, and far below what attention to a token changes.
    """
    needed = (
        f"{name} is a {type(model).__name__}; a causal language model is needed, such as a ...ForCausalLM of "
        "transformers: logits [1, tokens, vocabulary] of token ids alone, each position's of no later token"
    )
    low, high = int(tokens.min()), int(tokens.max())
    seen: list[Tensor] = []
    for other in (low if low < high else abs(high - 1), high):
        try:
            logits = _logits(model, torch.tensor([[high, other]]))
            shape = list(logits.shape)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{needed} ({type(error).__name__}: {error})") from error
        if shape[:-1] != [1, 2] or shape[-1] <= high:
            raise ValueError(f"{needed}; its logits of 2 tokens are {shape}")
        seen.append(logits[0, 0].to("cpu", torch.float32))
    first, second = seen
    epsilon = max(torch.finfo(t.dtype).eps for t in (logits, *model.parameters()) if t.is_floating_point())
    generates = getattr(model, "can_generate", lambda: False)()
    change = torch.where(first == second, 0.0, first - second).norm()  # equal where both are -inf
    if change > (math.sqrt(epsilon) if generates else 4 * epsilon) * first[first.isfinite()].norm():
        raise ValueError(f"{needed}; its prediction after one token changes with the token that follows")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks; none if it is not one stack."""
    try:
        stack = model.get_submodule(find_stack(model))
    except CalibrationError:
        return []
    return list(stack.children())


@dataclass
class _Seen:
    """What a model made of a window: its logits, and its blocks' outputs by their index."""

    logits: Tensor
    hidden: dict[int, Tensor]


def _run(model: nn.Module, row: Tensor, blocks: list[nn.Module]) -> _Seen:
    hidden: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(block: nn.Module, given: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                hidden[index] = first

        return hook

    hooks = [block.register_forward_hook(keep(index)) for index, block in enumerate(blocks)]
    try:
        return _Seen(_logits(model, row), hidden)
    finally:
        for handle in hooks:
            handle.remove()


def _quantile(values: Tensor, share: float) -> float:
    """As torch.quantile, also of infinite values and of any number of them."""
    place = share * (values.numel() - 1)
    low, high = (float(values.kthvalue(1 + at).values) for at in (math.floor(place), math.ceil(place)))
    return low if low == high else low + (place - math.floor(place)) * (high - low)


class _Sums:
    def __init__(self) -> None:
        self.loss = [0.0, 0.0]
        self.kl: list[Tensor] = []
        self.agree = 0
        self.tokens = 0
        self.layers: dict[int, list[float]] = {}

    def add(self, a: _Seen, b: _Seen, targets: Tensor) -> None:
        """One window: what the models made of it, and the tokens that follow all but the last of it."""
        if a.logits.shape[-1] != b.logits.shape[-1]:
            raise ValueError(f"the vocabularies differ: {a.logits.shape[-1]} and {b.logits.shape[-1]} tokens")
        for start in range(0, targets.numel(), _CHUNK):
            part = slice(start, min(start + _CHUNK, targets.numel()))
            p, q = (torch.log_softmax(out.logits[0, part].to("cpu", torch.float32), -1) for out in (a, b))
            for which, log in enumerate((p, q)):
                self.loss[which] -= float(log.gather(1, targets[part, None]).sum(dtype=torch.float64))
            self.agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            # What A rules out counts nothing, even if B does too. Rounding can take a sum of about nothing below zero.
            share = p.exp()
            self.kl.append(torch.where(share == 0, 0.0, share * (p - q)).sum(-1).clamp_min(0))
        self.tokens += targets.numel()
        self._add_layers(a.hidden, b.hidden)

    def _add_layers(self, a: dict[int, Tensor], b: dict[int, Tensor]) -> None:
        if a.keys() != b.keys():
            return
        for block in sorted(a):
            x, y = (hidden[block].to("cpu", torch.float32) for hidden in (a, b))
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
            _quantile(kl, 0.99),
            self.agree / self.tokens,
            self.tokens,
            layers,
        )
