"""What the loop asks of the processes that train together; the answers of a single one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import TrainConfig

if TYPE_CHECKING:
    from ..state import Snapshot

T = TypeVar("T")

#: Between the seeds of two processes; odd and far from the steps' distance of 1.
_SEED_STRIDE = 0x9E3779B97F4A7C15


class PeerError(ConnectionError):
    """Another process of the run failed or ended, so that this one cannot go on."""


class World:
    """One process, alone.

    Attributes:
        kind: "none", "ddp" or "fsdp". rank: number of this process, from 0. size: how many there are.
    """

    kind = "none"
    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows what goes on."""
        return self.rank == 0

    def rows(self, count: int) -> range:
        """Which of `count` rows that all see together this process computes."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def seed(self, seed: int) -> int:
        """Of this process's random numbers in a step whose seed is `seed`; the first process's is `seed` itself."""
        return (seed + self.rank * _SEED_STRIDE) % (1 << 63)

    def facts(self) -> dict[str, Any]:
        """JSON-able: what of the processes decides a result's bits."""
        return {"processes": self.size, "parallel": self.kind}

    # ---- agreeing ----------------------------------------------------------------------------------------------------

    def together(self) -> AbstractContextManager[None]:
        """A block without communication: an error of one process in it is an error of all after it.

        Raises:
            PeerError: another process had an error; says which process, and the error.
        """
        return nullcontext()

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raises ValueError naming what is not the same in all processes."""

    def from_first(self, make: Callable[[], T]) -> T:
        """make() of the first process, which alone runs it; its result, which can be pickled, or its error for all."""
        return make()

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return flag

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each."""
        return values

    def sum_of(self, value: float) -> float:
        """The same for a number, in double precision."""
        return value

    # ---- the model ---------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        """Raises ValueError for what these processes cannot train, naming it."""

    def align(self, model: nn.Module) -> None:
        """Adapters get the first process's values: theirs are drawn, and may have been with other random numbers."""

    def hold(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], dtype: torch.dtype | None = None
    ) -> dict[str, nn.Parameter]:
        """Take over the model; returns what this process has of the trained parameters, for the optimizer.

        `parameters` may be emptied, so that it does not keep what is given up. dtype: what they become first, if given.
        """
        cast(parameters.values(), dtype)
        return dict(parameters)

    def optimizer_options(self) -> Mapping[str, dict[str, Any]]:
        """By name of a parameter, what the optimizer is to be told of it."""
        return {}

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """function(*args), which uses the model; parameters are whole while it runs."""
        return function(*args)

    def gradients(self, last: bool) -> AbstractContextManager[None]:
        """In which forward and backward of a micro-batch run; after the last of a step, gradients are summed over all
        processes."""
        return nullcontext()

    def collect(self) -> None:
        """Give what `hold` returned its gradients."""

    def clear(self) -> None:
        """Take all gradients away, after the optimizer's own have been."""

    def squares(self, own: float) -> float:
        """The sum of squares of whole gradients, from that of what this process has of them."""
        return own

    # ---- files -------------------------------------------------------------------------------------------------------

    def write(self, tensors: Mapping[str, Tensor], do: Callable[[Mapping[str, Any]], T]) -> T:
        """do(tensors) in the first process, for what `hold` returned and what is beside it; its result for all.

        Tensors are named as in a `Snapshot`. `do` finds whole ones, or `state.Whole`s that fetch them one at a time.
        """
        return do(tensors)

    def spread(self, found: Snapshot | None) -> Snapshot | None:
        """What the first process has read, in every process: of each tensor what `hold` has of its parameter."""
        return found

    def assembled(self, model: nn.Module, names: list[str] | None) -> AbstractContextManager[None]:
        """A block in which the model of the first process has these parameters whole, None: all of them."""
        return nullcontext()


def cast(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> None:
    """Gives parameters values of another dtype, one after the other; who has them, ties included, has them so."""
    for parameter in parameters:
        if dtype is not None and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


ALONE = World()
