"""From a configuration to a `World`: who has started this process, and with how many others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import distributed as dist
from torch import nn

from ..allocator import returned_heap
from .world import ALONE, PeerError, World

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: In the messages of gloo and NCCL when the process at the other end is gone.
_LOST = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "read error",
    "write error",
    "timed out",
)


def launched() -> int:
    """Number of processes that torchrun (or another launcher with its variables) has started this one with; else 1."""
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in _VARIABLES) else 1


def launched_rank() -> int:
    """Number of this process among them."""
    return int(os.environ["RANK"]) if all(os.environ.get(name) for name in _VARIABLES) else 0


def local_device(device: str) -> str:
    """The device that "cuda" means for this process, by torchrun's LOCAL_RANK; anything else as it is."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank and launched() > 1 else device


@contextmanager
def open_world(parallel: str, model: nn.Module) -> Iterator[World]:
    """The processes that train `model` together, by TrainConfig.parallel.

    A process group that exists is used; else one is made from the launcher's variables, and taken down afterwards.

    Raises:
        ValueError: several processes are wanted and there is no sign of a launcher, or the model's device has none.
        PeerError: another process ended or failed while this one waited for it.
    """
    group = dist.is_available() and dist.is_initialized()
    processes = dist.get_world_size() if group else launched()
    if parallel == "none" or (parallel == "auto" and processes == 1):
        yield ALONE
        return
    if not dist.is_available():
        raise ValueError(f"parallel={parallel!r}: this torch was built without torch.distributed")
    if not group and not all(os.environ.get(name) for name in _VARIABLES):
        raise ValueError(
            f"parallel={parallel!r} needs processes: start them with torchrun --nproc-per-node N -m nybble finetune "
            "..., or make a process group with torch.distributed.init_process_group first"
        )
    device = next(model.parameters()).device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"parallel={parallel!r}: the model is on {device}; processes train together on cpu or cuda")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    sharded = parallel == "fsdp"
    from .replicated import Replicated
    from .sharded import Sharded

    if not group:
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        with _peers_named(), returned_heap() if sharded and device.type == "cpu" else nullcontext():
            yield (Sharded if sharded else Replicated)(device)
    finally:
        if not group:
            # Also after an error: the others then see at once that this process is gone.
            dist.destroy_process_group()


@contextmanager
def _peers_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in _LOST):
            raise
        raise PeerError("another process of this run failed or ended; its own message says why") from error
