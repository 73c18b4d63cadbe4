"""The option of commands whose work several processes can do, and torchrun in its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

T = TypeVar("T")

ProcessesOption = Annotated[
    int | None,
    typer.Option(
        help="Processes on this machine that share the output files. On several machines: torchrun ... -m nybble ..."
    ),
]


def in_processes(processes: int | None, call: Callable[[Any], T]) -> T:
    """`call(processes)` as the option says, or as one of torchrun's processes where the command runs in one.

    Raises:
        ValueError: both. Else whatever `call` raises.
        typer.Exit: this process is not the first one, which prints the result, or the error.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if started > 1 and processes not in (None, 1):
        raise ValueError(f"--processes {processes}: torchrun has started {started} processes already; use one of them")
    if started == 1 or processes == 1:
        return call(1 if processes is None else processes)
    from ..checkpoint.team import LostProcessError, ReportedError

    try:
        result = call("torchrun")
    except ReportedError as error:
        raise typer.Exit(1) from error
    except LostProcessError as error:
        if os.environ["RANK"] in ("0", "1"):  # the first tells of others, the second of the first
            raise
        raise typer.Exit(1) from error
    if os.environ["RANK"] != "0":
        raise typer.Exit
    return result
