"""A group of processes: what all kinds of `World` of more than one have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...nn.adapters import adapted_modules
from ..config import TrainConfig
from ..state import Snapshot
from .world import PeerError, World

T = TypeVar("T")


class Group(World):
    """Processes that torch.distributed has brought together.

    What is said here, numbers and files, goes through memory of the CPU and gloo, whatever the model is on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        alone = dist.get_backend() == "gloo"
        self.group: Any = None if alone else dist.new_group(backend="gloo")

    # ---- agreeing ----------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        told = self._all(None if error is None else _told(error))
        if error is not None:
            raise error
        for rank, text in enumerate(told):
            if text is not None:
                raise PeerError(f"process {rank} failed: {text}")

    def agree(self, facts: Mapping[str, str]) -> None:
        everywhere = self._all(dict(facts))
        for rank, other in enumerate(everywhere):
            different = [name for name in facts if other.get(name) != everywhere[0].get(name)]
            if different:
                listed = (_difference(name, everywhere[0].get(name), other.get(name)) for name in different)
                raise ValueError(
                    f"processes 0 and {rank} differ in their {' and '.join(listed)}; give each the same model, data "
                    "and configuration"
                )

    def from_first(self, make: Callable[[], T]) -> T:
        error: Exception | None = None
        held: list[Any] = [None, None]
        if self.first:
            try:
                held[0] = make()
            except Exception as raised:
                error = raised
                held[1] = _told(raised)
        dist.broadcast_object_list(held, src=0, group=self.group)
        if error is not None:
            raise error
        if held[1] is not None:
            raise PeerError(f"process 0 failed: {held[1]}")
        return held[0]

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor([int(flag)])))

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().to("cpu", copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def sum_of(self, value: float) -> float:
        return float(self.sum(torch.tensor([value], dtype=torch.float64)))

    def _all(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    # ---- the model ---------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        if config.batch_size % self.size:
            raise ValueError(
                f"batch_size={config.batch_size} is not a multiple of the {self.size} processes; it counts the "
                "sequences of a forward pass of all of them together, of which each computes its share"
            )
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"parameter {name} is on the meta device: it has no values yet")
            if hasattr(parameter, "placements"):
                raise ValueError(
                    f"parameter {name} is sharded already (parallel='fsdp' leaves a model so); load the model anew"
                )

    def _send(self, tensor: Tensor) -> None:
        """The first process's values into the tensors of the others, byte for byte."""
        if tensor.numel():
            values = tensor.detach().reshape(-1).to("cpu").contiguous().view(torch.uint8)
            dist.broadcast(values, src=0, group=self.group)
            if not self.first:
                with torch.no_grad():
                    tensor.copy_(values.view(tensor.dtype).view(tensor.shape))

    def align(self, model: nn.Module) -> None:
        described = str([(name, p.dtype, tuple(p.shape)) for name, p in model.named_parameters()])
        self.agree({"model's parameters": hashlib.sha256(described.encode()).hexdigest()})
        for module in adapted_modules(model).values():
            for parameter in module.adapters.parameters():
                self._send(parameter)

    # ---- files -------------------------------------------------------------------------------------------------------

    def write(self, tensors: Mapping[str, Tensor], do: Callable[[Mapping[str, Any]], T]) -> T:
        return self.from_first(lambda: do(tensors))

    def spread(self, found: Snapshot | None) -> Snapshot | None:
        described = None
        if found is not None:
            shapes = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.tensors.items()]
            described = found.step, found.facts, shapes
        described = self.from_first(lambda: described)
        if described is None:
            return None
        step, facts, shapes = described
        tensors = {}
        for name, dtype, shape in shapes:
            whole = torch.empty(shape, dtype=dtype) if found is None else found.tensors[name]
            self._send(whole)
            tensors[name] = self._own(name, whole)
        return Snapshot(step, tensors, facts)

    def _own(self, name: str, whole: Tensor) -> Tensor:
        """What this process has of a snapshot's tensor."""
        return whole


def _difference(name: str, first: str | None, other: str | None) -> str:
    """The name, with both values where these can be read; hashes and lists cannot."""
    short = all(value is not None and len(value) <= 40 for value in (first, other))
    return f"{name} ({first} and {other})" if short else name


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
