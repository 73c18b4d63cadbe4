"""What the linear layers of a block are given: which of them share an input, and that input's second moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Call, StopBlock


def groups(block: nn.Module, calls: Sequence[Call], hidden: Tensor, names: Iterable[str]) -> list[list[str]]:
    """The linear layers `names` of a block in the order in which it uses them, those with one input together.

    Samples are run until every layer has been seen. Layers that no sample reaches (an expert that no token was sent
    to) are in none of the groups.
    """
    wanted = {name: block.get_submodule(name) for name in names}
    found: list[list[str]] = []
    seen: set[str] = set()
    for call, sample in zip(calls, hidden, strict=True):
        last: list[Any] = [None]

        def note(name: str, given: Tensor, last: list[Any] = last) -> None:
            if name in seen:
                last[0] = given
                return
            seen.add(name)
            if given is last[0] and found:
                found[-1].append(name)
            else:
                found.append([name])
            last[0] = given  # kept, so that no other tensor gets its place in memory

        hooks = [
            module.register_forward_pre_hook(lambda module, given, name=name: note(name, given[0]))
            for name, module in wanted.items()
        ]
        try:
            call.on(block, sample[None])
        finally:
            for hook in hooks:
                hook.remove()
        if len(seen) == len(wanted):
            break
    return found


@contextmanager
def _caught(module: nn.Module) -> Iterator[list[Tensor]]:
    """The input of a module, whose block goes no further."""
    inputs: list[Tensor] = []

    def catch(module: nn.Module, given: tuple[Any, ...]) -> None:
        inputs.append(given[0])
        raise StopBlock

    hook = module.register_forward_pre_hook(catch)
    try:
        yield inputs
    finally:
        hook.remove()


def inputs(block: nn.Module, calls: Sequence[Call], hidden: Tensor, name: str) -> Iterator[Tensor | None]:
    """For every sample what the linear layer `name` is given, fp32 [tokens, K]; None if it is not reached."""
    module = block.get_submodule(name)
    for call, sample in zip(calls, hidden, strict=True):
        with _caught(module) as caught, suppress(StopBlock):
            call.on(block, sample[None])
        yield caught[0].reshape(-1, caught[0].shape[-1]) if caught else None


def second_moments(block: nn.Module, calls: Sequence[Call], hidden: Tensor, name: str) -> Tensor:
    """The mean of x x^T over the inputs of the linear layer `name`; fp32 [K, K].

    The block is run only as far as that layer.
    """
    total: Tensor | None = None
    count = 0
    for x in inputs(block, calls, hidden, name):
        if x is None or not x.shape[0]:
            continue
        if total is None:
            total = torch.zeros(x.shape[1], x.shape[1])
        total.addmm_(x.t(), x)
        count += x.shape[0]
    assert total is not None, "groups() saw this layer"
    return total.div_(count)


def run(block: nn.Module, calls: Sequence[Call], hidden: Tensor) -> None:
    """Replace every sample's hidden states by those after the block."""
    for call, sample in zip(calls, hidden, strict=True):
        sample.copy_(call.on(block, sample[None])[0])
