"""The whole model in every process: torch's DistributedDataParallel."""

# No `from __future__ import annotations`: DDP reads those of a hook.

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .calls import Calls
from .group import Group
from .world import cast

T = TypeVar("T")


class Replicated(Group):
    """DDP: gradients of trained parameters are summed while the backward pass goes on; nothing else is sent, so frozen
    weights stay mapped from their file, and processes of one machine share them."""

    kind = "ddp"
    _calls: DistributedDataParallel

    def hold(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], dtype: torch.dtype | None = None
    ) -> dict[str, nn.Parameter]:
        cast(parameters.values(), dtype)
        calls = Calls(model)
        # DDP warns where it was to look for unused parameters and found none.
        calls.unused = nn.Parameter(torch.zeros(1, device=self.device))
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        still: dict[str, Any] = {buffers: False}
        # init_sync=False: it would write to every parameter, and packed bytes that are mapped would become copies.
        # find_unused_parameters: adapters that do not act, and modules that a loss does not use, have no gradient; and
        # buckets are then never laid out anew after the first step, so that a resumed run adds in the same order.
        self._calls = DistributedDataParallel(
            calls,
            init_sync=False,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
            **still,
        )
        self._calls.register_comm_hook(None, _summed)
        return dict(parameters)

    def run(self, function: Callable[..., T], *args: Any) -> T:
        return self._calls(function, *args) if torch.is_grad_enabled() else function(*args)

    def gradients(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._calls.no_sync()


def _summed(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Each process's loss is divided by the targets of all of them, so gradients are summed, not averaged."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])
