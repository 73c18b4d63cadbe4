"""The memory of a method, by arithmetic: bytes of every part, in every phase of a step, with the formula beside.

A step holds different things at different times, so its peak is the largest of four moments: the loss (all activations
and some logits), the backward pass at the last layer (all activations and gradients on their way), at the first layer
(all gradients, few activations), and the optimizer's step (gradients and all of its state).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from . import activations
from .shapes import Shape
from .work import ACTIVATION, Work, adapted, check_method, optimizer_bytes, packed_bytes, trained_count, trained_tensors

#: Python, torch, transformers and nybble after their imports: resident bytes, most of it code. Measured on Linux with
#: torch 2.13's CPU build.
IMPORTS = 365_000_000
#: What the first step takes above the imports whatever a model's size: threads' stacks, pages of libraries that are
#: used for the first time. Measured on models of one layer, whose tensors are subtracted: 34 to 37 MB.
FIRST_USE = 35_000_000
#: The kernels that torch's oneDNN generates, where it multiplies: every base but a quantized one, and over that LoRA's
#: factors where the CPU has AMX (15.5 MB more than without there, measured). Measured alike: 47 to
#: 53 MB with FIRST_USE.
GENERATED = 16_000_000
#: A piece of an operand or a result where a CPU without bf16 instructions multiplies in fp32 (backends/products.py).
PIECE = 4 << 20
#: The same of a process that only generates, whatever the base: 19 to 28 MB.
FORWARD_USE = 24_000_000
#: The same of CUDA, in the GPU's memory: context and library handles. An assumption.
CUDA_CONTEXT = 600_000_000
#: torch's CUDA allocator takes segments of 2 and 20 MB and rounds large ones up to 2 MB. An assumption.
CUDA_ROUNDING = 0.03

#: What the CUDA kernels of linear layers share on a stream: partial sums and counters (WORKSPACE_BYTES of csrc/cuda).
CUDA_WORKSPACE = 17_825_792
#: Rows from which a GPU decodes a weight as a whole and leaves its product to cuBLAS (csrc/cuda/choose.cpp: 1,024 on
#: Hopper); the gradient of the inputs is computed on the packed bytes always. Metal's kernels never decode a whole one.
CUDA_DECODES_FROM = 128

PARTS = (
    "weights",
    "scales",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "workspace",
    "kv_cache",
    "runtime",
)


@dataclass(frozen=True)
class Line:
    """One line of the arithmetic: which part, how it was computed, and its bytes."""

    part: str
    formula: str
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a method takes.

    Attributes:
        method, base, checkpointing: of what. trained: parameters that are trained, share: of all parameters.
        phase: the moment of the peak. lines: what is held then. phases: bytes at every moment, runtime included.
    """

    method: str
    base: str
    checkpointing: bool
    trained: int
    share: float
    phase: str
    lines: tuple[Line, ...]
    phases: dict[str, int] = field(hash=False)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(line.bytes for line in self.lines)

    def part(self, name: str) -> int:
        """Bytes of one of PARTS at the peak."""
        return sum(line.bytes for line in self.lines if line.part == name)

    @property
    def above_imports(self) -> int:
        """Bytes at the peak beside those that a process has after its imports, as the benchmarks measure it (CPU)."""
        return self.total - IMPORTS


def estimate(shape: Shape, method: str, base: str, work: Work, checkpointing: bool = False) -> Estimate:
    """The memory of `method` over a base of `base` weights.

    Raises ValueError for a method and a base that do not go together.
    """
    return peak_of(moments(shape, method, base, work, checkpointing), shape, method, base, work, checkpointing)


def moments(shape: Shape, method: str, base: str, work: Work, checkpointing: bool = False) -> dict[str, list[Line]]:
    """What is held at every moment of a step, by the moment's name; see `estimate`."""
    check_method(method, base)
    held = _resident(shape, method, base, work)
    if method == "inference":
        found = _generating(shape, work)
    else:
        found = _Step(shape, method, base, work, checkpointing).moments()
    return {name: [*held, *lines] for name, lines in found.items()}


def peak_of(
    found: dict[str, list[Line]], shape: Shape, method: str, base: str, work: Work, checkpointing: bool
) -> Estimate:
    """The largest of these moments."""
    totals = {name: sum(line.bytes for line in lines) for name, lines in found.items()}
    phase = max(totals, key=lambda name: totals[name])
    lines = found[phase]
    if work.device == "cuda":
        extra = CUDA_ROUNDING * sum(line.bytes for line in lines if line.part != "runtime")
        lines = [*lines, _line("runtime", f"torch's allocator: {CUDA_ROUNDING:.0%} of the above (assumed)", extra)]
    trained = trained_count(shape, method, work)
    kept = tuple(line for line in lines if line.bytes)
    return Estimate(method, base, checkpointing, trained, trained / shape.parameters, phase, kept, totals)


def _line(part: str, formula: str, count: float) -> Line:
    return Line(part, formula, round(count))


def _resident(shape: Shape, method: str, base: str, work: Work) -> list[Line]:
    """What is held all the time."""
    lines = _weights(shape, base)
    if work.device == "cuda" and base == "nf4":
        lines.append(_line("workspace", "partial sums of the kernels for linear layers", CUDA_WORKSPACE))
        if work.batch * work.seq >= CUDA_DECODES_FROM:
            largest = max(m.out_features * m.in_features for m in shape.matrices if m.quantizable)
            how = f"the largest weight, decoded for many rows: {ACTIVATION} bytes x {largest:,}"
            lines.append(_line("workspace", how, ACTIVATION * largest))
    if work.device == "cuda":
        lines.append(_line("runtime", "CUDA context and handles (assumed)", CUDA_CONTEXT))
    else:
        lines.append(_line("runtime", "Python, torch, transformers after their imports (measured)", IMPORTS))
        first = FORWARD_USE if method == "inference" else FIRST_USE
        lines.append(_line("runtime", "threads' stacks, library pages of the first step (measured)", first))
        if work.widened and method != "inference":
            lines.append(_widened(shape, method, base, work))
        elif (base != "nf4" or work.matrix_unit) and method != "inference":
            lines.append(_line("runtime", "kernels that oneDNN generates for products (measured)", GENERATED))
    return lines


def _widened(shape: Shape, method: str, base: str, work: Work) -> Line:
    """What `backends.products` holds: pieces of both operands and of the result, and more of a plain weight's product:
    the smaller operand whole, or the sum where the contraction is the longest side."""
    tokens, more = activations.tokens_of(method, work), 0
    if base != "nf4":
        for matrix in shape.matrices:
            for k, n in ((matrix.in_features, matrix.out_features), (matrix.out_features, matrix.in_features)):
                held = 4 * tokens * n if k > max(tokens, n) else 4 * k * min(tokens, n) - PIECE
                more = max(more, held)
    formula = f"products of 16 bits in fp32: 3 pieces of {PIECE:,} bytes"
    return _line("workspace", formula + (f", {more:,} more of a weight's" if more else ""), 3 * PIECE + more)


def _weights(shape: Shape, base: str) -> list[Line]:
    if base != "nf4":
        size = {"bf16": 2, "fp32": 4}[base]
        return [_line("weights", f"{size} bytes x {shape.parameters:,} parameters", size * shape.parameters)]
    weights, scales = packed_bytes(shape)
    rest = shape.parameters - shape.packed
    return [
        _line("weights", f"4 bits x {shape.packed:,} weights of linear layers", weights),
        _line("weights", f"2 bytes x {rest:,} parameters that stay (embeddings, head, norms, biases)", 2 * rest),
        _line("scales", "a byte for 64 weights, 4 bytes for 256 of these, tables of each layer", scales),
    ]


def _generating(shape: Shape, work: Work) -> dict[str, list[Line]]:
    """Reading a prompt of `seq` tokens: the keys and values of all layers, and one layer at work."""
    e, tokens = ACTIVATION, work.batch * work.seq
    cache = 2 * e * shape.layers * shape.keys * tokens
    width = max(3 * shape.ffn + 2 * shape.hidden, 3 * shape.queries + 2 * shape.hidden)
    lines = [
        _line(
            "activations",
            f"one layer at work: {e} bytes x {width:,} (3 ffn + 2 hidden) x {tokens:,} tokens",
            e * width * tokens,
        )
    ]
    if shape.scores:
        size = 10 * shape.heads * tokens * work.seq
        how = f"its scores in the open: 10 bytes x {shape.heads} heads x {tokens:,} tokens x {work.seq:,}"
        lines.append(_line("activations", how, size))
    if shape.head:
        values = f"2 (keys, values) x {e} bytes x {shape.layers} layers x {shape.keys:,} x {tokens:,} tokens"
        lines.insert(0, _line("kv_cache", values, cache))
        lines.append(
            _line(
                "loss",
                f"logits of the last token: 4 bytes x {shape.vocab:,} x {work.batch} rows",
                4 * shape.vocab * work.batch,
            )
        )
    return {"reading the prompt": lines}


class _Step:
    """The moments of a training step."""

    def __init__(self, shape: Shape, method: str, base: str, work: Work, checkpointing: bool) -> None:
        self.shape, self.method, self.base, self.work, self.checkpointing = shape, method, base, work, checkpointing
        self.tokens = activations.tokens_of(method, work)
        self.stream = 4 if base == "fp32" else ACTIVATION
        self.tensors = trained_tensors(shape, method, work)
        self.trained = trained_count(shape, method, work)
        self.full = method == "full"
        kept = activations.layer(shape, method, base, work)
        self.per_token = sum(k.per_token for k in kept)
        self.fixed = sum(k.fixed for k in kept)
        self.kept = kept
        self.one_layer = self.per_token * self.tokens + self.fixed

    def moments(self) -> dict[str, list[Line]]:
        held = self._trained_state()
        found = {
            "loss": [*held, *self._activations(), *self._casts(self.shape.layers), *self._loss()],
            "backward, last layer": [*held, *self._activations(), *self._recomputed(), *self._backward_last()],
            "backward, first layer": [*held, *self._backward_first()],
            "optimizer step": [*held, self._gradients(self.trained, "all gradients")],
        }
        if self.method == "dora" and self.base == "bf16":
            found["forward, last layer"] = [*held, *self._activations(), *self._casts(self.shape.layers), self._norms()]
        return found

    def _norms(self) -> Line:
        """DoRA's norms of a plain weight are computed from a copy in fp32."""
        largest = max((m.out_features * m.in_features for m in adapted(self.shape)), default=0)
        return _line("workspace", f"the largest weight in fp32, for DoRA's norms: 4 bytes x {largest:,}", 4 * largest)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _trained_state(self) -> list[Line]:
        lines = []
        if not self.full:
            lines.append(_line("adapters", f"4 bytes x {self.trained:,} trained parameters", 4 * self.trained))
        name = self.work.optimizer
        each = {
            "adamw": "8 bytes x",
            "adamw8bit": "2 bytes and 8 for 256 x (8 where a tensor has below 4,096)",
            "lion": "4 bytes x",
            "sgd": "0 bytes x",
        }[name]
        lines.append(_line("optimizer", f"{name}: {each} {self.trained:,}", optimizer_bytes(self.tensors, name)))
        return lines

    def _gradients(self, count: float, what: str) -> Line:
        return _line("gradients", f"{what}: 4 bytes x {count:,.0f}", 4 * count)

    def _activations(self) -> list[Line]:
        """What lies between forward and backward pass."""
        shape, n = self.shape, self.tokens
        if self.checkpointing:
            size = self.stream * shape.hidden * n
            each = f"{self.stream} bytes x {shape.hidden:,} x {n:,} tokens"
            formula = f"inputs of {shape.layers} layers: {shape.layers} x {each}"
            return [_line("activations", formula, shape.layers * size)]
        first = activations.not_kept_by_first(shape, self.method, self.base, self.work)
        total = shape.layers * self.one_layer - first * n
        fixed = f" + {self.fixed:,.0f}" if self.fixed else ""
        formula = f"{shape.layers} layers x ({self.per_token:,.0f} bytes x {n:,} tokens{fixed})"
        return [_line("activations", formula + (f" - {first:,.0f} x {n:,} of the first" if first else ""), total)]

    def _casts(self, layers: int) -> list[Line]:
        """bf16 copies that autocast makes of trained fp32 weights, for as long as their layer is not through."""
        if self.full:
            count = self.shape.linear * layers // self.shape.layers
            return [_line("workspace", f"weights in bf16 for the products: 2 bytes x {count:,}", 2 * count)]
        if self.method == "bottleneck" or (self.method in ("lora", "dora") and self.base != "nf4"):
            count = self.trained * layers // self.shape.layers
            return [_line("workspace", f"adapters in bf16 for the products: 2 bytes x {count:,}", 2 * count)]
        return []

    def _recomputed(self) -> list[Line]:
        """The layer that checkpointing computes again; its input is there already."""
        if not self.checkpointing:
            return self._casts(self.shape.layers)
        size = self.one_layer - self.stream * self.shape.hidden * self.tokens
        formula = f"one layer computed again: {self.per_token:,.0f} bytes x {self.tokens:,} tokens, less its input"
        return [_line("activations", formula, size), *self._casts(1)]

    def _loss(self) -> list[Line]:
        shape, n, work = self.shape, self.tokens, self.work
        states = 3 * self.stream * shape.hidden * n
        lines = [
            _line(
                "loss",
                f"final norm's input and output, gradient: 3 x {self.stream} bytes x {shape.hidden:,} x {n:,}",
                states,
            )
        ]
        if not shape.head:
            return lines
        chunk = min(work.loss_chunk, work.batch * work.seq)
        lines.append(
            _line("loss", f"logits in bf16: 2 bytes x {chunk} tokens x {shape.vocab:,}", 2 * chunk * shape.vocab)
        )
        if shape.capped:
            size = 4 * chunk * shape.vocab
            lines.append(
                _line("loss", f"logits as they are capped: 2 x 2 bytes x {chunk} tokens x {shape.vocab:,}", size)
            )
        scratch = 2 << 20 if work.device == "cpu" else 4 * chunk * shape.vocab
        lines.append(_line("loss", "softmax's fp32 scratch", min(scratch, 4 * chunk * shape.vocab)))
        if self.full:
            lines.append(
                _line(
                    "loss",
                    f"head in bf16, its gradient (fp32), a chunk's (bf16, fp32): 12 bytes x {shape.embedding:,}",
                    12 * shape.embedding,
                )
            )
        return lines

    def _flight(self) -> list[Line]:
        size = activations.in_flight(self.shape, self.method, self.base, self.work)
        return [
            _line(
                "workspace", f"gradients on their way: {size:,.0f} bytes x {self.tokens:,} tokens", size * self.tokens
            )
        ]

    def _backward_last(self) -> list[Line]:
        lines = self._flight()
        if self.full and self.shape.head:
            lines.append(self._gradients(self.shape.embedding, "the head's gradient"))
        return lines

    def _backward_first(self) -> list[Line]:
        first = activations.not_kept_by_first(self.shape, self.method, self.base, self.work)
        size = self.one_layer - first * self.tokens
        lines = [_line("activations", f"one layer: {self.per_token:,.0f} bytes x {self.tokens:,} tokens", size)]
        count = self.trained
        if self.full:  # the embedding's comes last; where it is the head too, beside the head's
            count -= self.shape.linear // self.shape.layers + (0 if self.shape.tied else self.shape.embedding)
        return [*lines, *self._casts(1), *self._flight(), self._gradients(count, "gradients so far")]
