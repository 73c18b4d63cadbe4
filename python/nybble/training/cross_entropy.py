"""Linear head and cross-entropy in one, a chunk of tokens at a time, forward and gradient together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..backends.products import product, product_into, widened
from .data.rows import IGNORE

_SCRATCH = 1 << 19
"""fp32 numbers of the softmax's scratch on a CPU: 2 MB, so that its passes stay within the caches."""


def chunked_cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor, chunk: int = 256) -> Tensor:
    """Sum of the cross-entropy of head(hidden) against targets, fp32, `chunk` predicted tokens at a time.

    hidden: [tokens, hidden], any floating dtype; targets: int64 [tokens], IGNORE allowed: the head is not applied to
    tokens whose target does not count. Gradients reach `hidden` and the head's trainable parameters, for which they are
    summed in fp32. `backward` may run once.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be [tokens, hidden] and targets [tokens], got {list(hidden.shape)} and {list(targets.shape)}"
        )
    trainable = [p for p in head.parameters() if p.requires_grad]
    return _ChunkedCrossEntropy.apply(hidden, targets, head, chunk, torch.is_grad_enabled(), *trainable)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, chunk: int, grad: bool, *parameters: Tensor
    ) -> Tensor:
        wanted = grad and (hidden.requires_grad or bool(parameters))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wanted and hidden.requires_grad else None
        run = _make_head(head, hidden, parameters if wanted else (), grad_hidden is not None, chunk)
        for tokens in _chunks(targets, chunk):
            part, wanted_tokens = hidden[tokens], targets[tokens]
            logits = run.logits(part)
            loss, grad_logits = run.softmax(logits, wanted_tokens, wanted)
            total += loss
            if grad_logits is not None:
                grad_part = run.gradients(part, grad_logits)
                if grad_hidden is not None and grad_part is not None:
                    grad_hidden[tokens] = grad_part.to(grad_hidden.dtype)
        ctx.has_hidden = grad_hidden is not None
        ctx.save_for_backward(*([] if grad_hidden is None else [grad_hidden]), *run.grad_parameters)
        ctx.dtypes = [p.dtype for p in parameters]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        grad_hidden = saved.pop(0).mul_(grad) if ctx.has_hidden else None
        grads = [None if g is None else g.mul_(grad).to(dtype) for g, dtype in zip(saved, ctx.dtypes, strict=True)]
        return grad_hidden, None, None, None, None, *grads


def _chunks(targets: Tensor, chunk: int) -> Iterator[slice | Tensor]:
    """The tokens that count, `chunk` at a time: slices where all do."""
    counted = targets != IGNORE
    if counted.all():
        for start in range(0, targets.shape[0], chunk):
            yield slice(start, start + chunk)
    else:
        yield from counted.nonzero()[:, 0].split(chunk) if counted.any() else ()


def _make_head(
    head: nn.Module, hidden: Tensor, parameters: tuple[Tensor, ...], grad_hidden: bool, chunk: int
) -> _LinearHead | _AnyHead:
    """The fast way for a matrix product and nothing else, in a dtype that both sides have."""
    chunk = min(chunk, hidden.shape[0])
    if _is_plain_linear(head, hidden):
        return _LinearHead(head, parameters, grad_hidden, chunk)
    return _AnyHead(head, parameters, grad_hidden, chunk)


def _is_plain_linear(head: nn.Module, hidden: Tensor) -> TypeGuard[nn.Linear]:
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if type(head) is not nn.Linear or "forward" in vars(head) or any(hooks):
        return False
    return torch.is_autocast_enabled(hidden.device.type) or head.weight.dtype == hidden.dtype


class _Head:
    """What a chunk's logits and gradients are computed with. Buffers are made once: new large ones cost page faults."""

    grad_parameters: Sequence[Tensor | None]

    def __init__(self) -> None:
        self._scratch: Tensor | None = None

    def logits(self, part: Tensor) -> Tensor:
        raise NotImplementedError

    def gradients(self, part: Tensor, grad_logits: Tensor) -> Tensor | None:
        raise NotImplementedError

    def softmax(self, logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def _softmax_into(self, logits: Tensor, targets: Tensor, grad_logits: Tensor | None) -> Tensor:
        """Sum of -log p of the targets; its gradient into grad_logits, which may be `logits`, some rows at a time."""
        vocabulary = logits.shape[1]
        rows = max(1, _SCRATCH // vocabulary) if logits.device.type == "cpu" else logits.shape[0]
        if self._scratch is None:
            self._scratch = logits.new_empty(min(rows, logits.shape[0]), vocabulary, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for start in range(0, logits.shape[0], rows):
            block = slice(start, start + rows)
            index = targets[block, None]
            x = self._scratch[: index.shape[0]].copy_(logits[block])
            x.sub_(x.amax(1, keepdim=True))
            target = x.gather(1, index)
            normalizer = x.exp_().sum(1, keepdim=True)
            total += (normalizer.log() - target).sum()
            if grad_logits is not None:
                x.div_(normalizer)
                x.scatter_(1, index, x.gather(1, index) - 1.0)
                grad_logits[block] = x
        return total


class _LinearHead(_Head):
    """nn.Linear: products into buffers that all chunks share; the logits' buffer becomes their gradient's."""

    def __init__(self, head: nn.Linear, parameters: tuple[Tensor, ...], grad_hidden: bool, chunk: int) -> None:
        super().__init__()
        device = head.weight.device.type
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
        self.weight = head.weight.detach().to(self.dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(self.dtype)
        self._logits = self.weight.new_empty(chunk, self.weight.shape[0])
        self._wants_hidden = grad_hidden
        self.grad_parameters: list[Tensor] = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        trained = {id(p): grad for p, grad in zip(parameters, self.grad_parameters, strict=True)}
        self._grad_weight = trained.get(id(head.weight))
        self._grad_bias = None if head.bias is None else trained.get(id(head.bias))
        self._product: Tensor | None = None

    def logits(self, part: Tensor) -> Tensor:
        logits = self._logits[: part.shape[0]]
        product_into(part.detach().to(self.dtype), self.weight.t(), logits)
        return logits if self.bias is None else logits.add_(self.bias)

    def softmax(self, logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        grad_logits = logits if wanted else None
        return self._softmax_into(logits, targets, grad_logits), grad_logits

    def gradients(self, part: Tensor, grad_logits: Tensor) -> Tensor | None:
        with torch.autocast(grad_logits.device.type, enabled=False):
            if self._grad_weight is not None:
                self._add_product(self._grad_weight, grad_logits.t(), part.detach().to(self.dtype))
            if self._grad_bias is not None:
                self._grad_bias += grad_logits.sum(0, dtype=torch.float32)
            return product(grad_logits, self.weight) if self._wants_hidden else None

    def _add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if self.dtype == torch.float32 or widened(a):
            product_into(a, b, total, add=True)
            return
        if self._product is None:
            self._product = total.new_empty(total.shape, dtype=self.dtype)
        total += torch.mm(a, b, out=self._product)


class _AnyHead(_Head):
    """Any module: its own forward and autograd's gradient of it."""

    def __init__(self, head: nn.Module, parameters: tuple[Tensor, ...], grad_hidden: bool, chunk: int) -> None:
        super().__init__()
        self.head: Callable[[Tensor], Tensor] = head
        self._parameters = list(parameters)
        self._wants_hidden = grad_hidden
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._grad_logits: Tensor | None = None
        self._chunk = chunk
        self.grad_parameters: list[Tensor | None] = [None for _ in parameters]

    def logits(self, part: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._wants_hidden or bool(self._parameters)):
            self._input = part.detach().requires_grad_(self._wants_hidden)
            self._output = self.head(self._input)
        return self._output.detach()

    def softmax(self, logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        grad_logits = None
        if wanted:
            # Not the logits' own memory: the head may have saved its output for its gradient.
            if self._grad_logits is None:
                self._grad_logits = logits.new_empty(self._chunk, logits.shape[1])
            grad_logits = self._grad_logits[: logits.shape[0]]
        return self._softmax_into(logits, targets, grad_logits), grad_logits

    def gradients(self, part: Tensor, grad_logits: Tensor) -> Tensor | None:
        assert self._input is not None and self._output is not None
        inputs = [*([self._input] if self._wants_hidden else []), *self._parameters]
        # Parameters of adapters that do not act take no part, and have no gradient in the end.
        grads = list(torch.autograd.grad(self._output, inputs, grad_logits, allow_unused=True))
        self._output = None
        grad_part = grads.pop(0) if self._wants_hidden else None
        for i, grad in enumerate(grads):
            total = self.grad_parameters[i]
            if grad is not None:
                self.grad_parameters[i] = grad.float() if total is None else total.add_(grad)
        return grad_part
