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
def joined(parallel: str, device: str) -> Iterator[World]:
    """The processes that torchrun has started, before any has a model: `finetune` then finds their group.

    What one of them cannot load, all hear of at once (`World.together`); else they would wait for it half an hour.
    Without a launcher, with parallel="none" and on devices where processes do not train together, it is this one alone.
    """
    able = device == "cpu" or (device.partition(":")[0] == "cuda" and torch.cuda.is_available())
    group = dist.is_available() and dist.is_initialized()
    if parallel == "none" or (launched() == 1 and not group) or not able:
        yield ALONE
        return
    from .group import Group

    if not group:
        _begin(torch.device(device))
    try:
        with _peers_named():
            yield Group(torch.device(device))
    finally:
        if not group:
            dist.destroy_process_group()


def idle_cores() -> str | None:
    """What to say where processes of this machine leave cores idle: torchrun gives each one thread by itself."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if launched() == 1 or local * (torch.get_num_threads() + 1) > cores:
        return None
    return (
        f"{local} processes here have {torch.get_num_threads()} threads each, this machine {cores} cores: "
        f"OMP_NUM_THREADS={cores // local} uses them"
    )


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
    sharded = parallel == "fsdp"
    from .replicated import Replicated
    from .sharded import Sharded

    if group and device.type == "cuda":
        torch.cuda.set_device(device)
    if not group:
        _begin(device)
    try:
        with _peers_named(), returned_heap() if sharded and device.type == "cpu" else nullcontext():
            yield (Sharded if sharded else Replicated)(device)
    finally:
        if not group:
            # Also after an error: the others then see at once that this process is gone.
            dist.destroy_process_group()


def _begin(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")


@contextmanager
def _peers_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in _LOST):
            raise
        raise PeerError("another process of this run failed or ended; its own message says why") from error
