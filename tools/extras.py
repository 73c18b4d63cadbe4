"""python tools/extras.py EXTRA...: the requirements of the installed package's extras, one a line.

`pip install -e ".[test]"` would build the package once more for every further set of packages, its kernels for GPUs
included.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys


def requirements(extras: list[str]) -> list[str]:
    """What these extras of nybble ask for; raises ValueError for one that there is not."""
    metadata = importlib.metadata.metadata("nybble")
    unknown = set(extras) - set(metadata.get_all("Provides-Extra") or ())
    if unknown:
        raise ValueError(f"nybble has no extra {', '.join(sorted(unknown))}")
    found = []
    for line in importlib.metadata.requires("nybble") or ():
        requirement, _, marker = line.partition(";")
        named = re.search(r"""extra\s*==\s*["']([^"']+)["']""", marker)
        if named is not None and named[1] in extras:
            found.append(requirement.strip())
    return found


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
