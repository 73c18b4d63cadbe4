"""How much memory there is: this machine's, or what its container may use; and what the system keeps for itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

#: What the operating system and its services need of a machine's memory: at least, and as a share. Assumptions.
SYSTEM_LEAST, SYSTEM_SHARE = 1_000_000_000, 0.05
#: Of a GPU's memory: the driver's and a display's. An assumption.
DRIVER = 300_000_000
#: Of memory that CPU and GPU share, what the GPU may not use: Metal recommends two thirds to three quarters. An
#: assumption.
UNIFIED_SHARE = 0.25


@dataclass(frozen=True)
class Memory:
    """Bytes that there are, bytes of them that are not for us, and how both were found."""

    bytes: int
    system: int
    found: str

    @property
    def free(self) -> int:
        """Bytes that a run may take."""
        return max(0, self.bytes - self.system)


def given(count: float, device: str) -> Memory:
    """A machine of so many bytes, less what its system needs."""
    total = int(count)
    if device == "cuda":
        return Memory(total, min(total, DRIVER), "given")
    least = max(SYSTEM_LEAST, int(SYSTEM_SHARE * total))
    system = max(least, int(UNIFIED_SHARE * total)) if device == "unified" else least
    return Memory(total, min(total, system), "given")


def here(device: str = "cpu", root: Path = Path("/")) -> Memory:
    """This machine's memory, or the limit of the container (control group, version 1 or 2) that the process is in.

    A container's limit is for its own processes, so nothing of it is the system's.

    Raises:
        ValueError: the device is "cuda" and there is none, or the platform does not tell.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("device is 'cuda' and this machine has none: say its memory with --memory (memory=)")
        properties = torch.cuda.get_device_properties(0)
        return Memory(properties.total_memory, DRIVER, f"memory of {properties.name}")
    total = _physical()
    limit, file = _container(root)
    if limit is not None and limit < total:
        return Memory(limit, 0, f"limit of this container ({file})")
    return Memory(total, given(total, device).system, "memory of this machine")


def _physical() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        raise ValueError(
            "memory of this machine: the platform does not tell; say it with --memory (memory=), such as 16GB"
        ) from None


def _container(root: Path) -> tuple[int | None, str]:
    """The least limit of the process's control groups and their parents, and its file."""
    found: list[tuple[int, str]] = []
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    places = [(base, "memory.max"), (base / "memory", "memory.limit_in_bytes")]
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            top, name = base, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = base / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        places += [(place, name) for place in (group, *group.parents) if place.is_relative_to(top)]
    for place, name in dict.fromkeys(places):
        try:
            text = (place / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max": none
            found.append((int(text), f"/{(place / name).relative_to(root)}"))
    return min(found, default=(None, ""))
