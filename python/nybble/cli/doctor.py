"""`nybble doctor`: what this machine and process have, and which kernel would run for a shape."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Annotated

import typer

from .shared import check_device

# [out_features, in_features] of common layers: square 7B attention, 7B MLP, 135M MLP.
SHAPES = ((4096, 4096), (11008, 4096), (1536, 576))
ROWS = (1, 256)


def parse_shape(text: str) -> tuple[int, int]:
    """(N, K) from "4096,11008"; ValueError otherwise."""
    match = re.fullmatch(r"\s*(\d+)\s*[,x]\s*(\d+)\s*", text)
    if match is None or 0 in (shape := (int(match[1]), int(match[2]))):
        raise ValueError(f"shape must be out_features,in_features such as 4096,11008, got {text!r}")
    return shape


def openmp_runtimes() -> list[str] | None:
    """Paths of the OpenMP runtime libraries mapped into this process; None where /proc does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if re.match(r"lib(gomp|iomp5|omp)\b", os.path.basename(path)))


def cuda_kernels() -> str:
    """Whether nybble's kernels for NVIDIA GPUs are there, and serve the ones of this machine."""
    import torch

    from nybble.backends import cuda

    try:
        cuda.core()
    except ImportError:
        return "not built: building them needs nvcc (NYBBLE_CUDA=ON says what is missing)"
    if not torch.cuda.is_available():
        return "built; torch sees no GPU"
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return "\n".join(f"{gpu}: {cuda.missing(gpu) or 'served'}" for gpu in gpus)


def metal_kernels() -> str:
    """Whether nybble's kernels for Apple's GPUs serve the one of this machine, with the text they are compiled from."""
    import torch

    from nybble.backends import mps

    try:
        texts = [mps.source(name) for name in ("dequantize", "quantize", "linear_small_m", "linear_tiles")]
    except OSError as error:
        return f"not there: {error}"
    lines = sum(text.count("\n") for text in texts)
    return mps.missing(torch.device("mps")) or f"served; {lines} lines, compiled on first use"


def facts() -> list[tuple[str, str]]:
    """(what, value) of the machine, this process and its libraries."""
    import torch

    import nybble

    found = openmp_runtimes()
    if found is None:
        openmp = "unknown on this platform"
    else:
        openmp = "\n".join(found) or "none"
        openmp += "\nwarning: more than one runtime; their threads compete" if len(found) > 1 else ""
    forced = os.environ.get("NYBBLE_FORCE_ISA")
    active = nybble.active_isa() + (f" (NYBBLE_FORCE_ISA={forced})" if forced else "")
    cuda = "no"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cuda = f"yes, CUDA {torch.version.cuda}: {', '.join(names)}"
    return [
        ("nybble", getattr(nybble, "__version__", "unknown")),
        ("machine", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("active ISA", active),
        ("ISAs of this machine", ", ".join(nybble.isas())),
        ("threads", f"{torch.get_num_threads()} (of {os.cpu_count()} logical CPUs)"),
        ("OpenMP runtimes", openmp),
        ("torch", torch.__version__),
        ("CUDA in torch", cuda),
        ("CUDA kernels", cuda_kernels()),
        ("MPS in torch", "yes" if torch.backends.mps.is_available() else "no"),
        ("Metal kernels", metal_kernels()),
    ]


def command(
    shape: Annotated[str | None, typer.Option(help="N,K (out_features, in_features) to explain.")] = None,
    m: Annotated[int | None, typer.Option("--m", help="Rows of the input (tokens).")] = None,
    dtype: Annotated[str, typer.Option(help="The input's dtype: float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Say what runs here: instruction sets, threads, OpenMP, devices, and the kernel chosen for a shape."""
    shapes = SHAPES if shape is None else (parse_shape(shape),)
    if m is not None and m < 1:
        raise ValueError(f"m must be at least 1, got {m}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    import torch
    from rich.console import Console
    from rich.table import Table

    import nybble

    check_device(device)
    console = Console(soft_wrap=True)
    table = Table("what", "value", show_header=False)
    table.columns[1].overflow = "fold"  # a path is copied whole or not at all
    for what, value in facts():
        table.add_row(what, value)
    console.print(table)
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else device
    title = f"kernels for {dtype} input, {where}"
    kernels = Table("N, K", "m", "operation", "kernel", "computes in", title=title, title_justify="left")
    reasons: dict[str, None] = {}
    for size in shapes:
        for rows in ROWS if m is None else (m,):
            for backward in (False, True):
                chosen = nybble.explain(size, m=rows, dtype=getattr(torch, dtype), grad_input=backward, device=device)
                shown = f"{size[0]}, {size[1]}"
                kernels.add_row(shown, str(rows), chosen.operation, chosen.kernel, chosen.compute)
                reasons[f"{chosen.kernel} for {chosen.operation}: {chosen.reason}"] = None
    console.print(kernels)
    for reason in reasons:
        console.print(reason)


def register(app: typer.Typer) -> None:
    """Add `nybble doctor`."""
    app.command("doctor")(command)
