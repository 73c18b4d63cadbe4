"""What a launch reads, writes and computes: a stand-in for `compile_shader` whose kernels count.

Counted as the text has it, lane by lane, for fp16 activations; no cache is modelled. For every tensor three figures:

- asked: bytes that lanes ask for, each by itself;
- by_group: different bytes of a threadgroup, summed over threadgroups, as if nothing were kept from one to the next;
- once: different bytes of the whole launch.

Operations: fp32 arithmetic and comparisons of single lanes (an fma is one, simd_sum five a lane, a negation none), and
multiply-adds of simdgroup matrices. Integer instructions, conversions and addresses are not counted: how many there are
is the compiler's.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .build import counting_library
from .library import Kernel, Library


class Traffic(NamedTuple):
    asked: int
    by_group: int
    once: int


class Counts(NamedTuple):
    """Of one launch; `reads` and `writes` by number of the buffer, for tensors that it touches."""

    kernel: str
    reads: dict[int, Traffic]
    writes: dict[int, Traffic]
    shared_read: int  # bytes of threadgroup memory
    shared_written: int
    lookups: int  # of codes in the codebook's table: decoded 4-bit weights
    scalar: int
    matrix: int

    def total(self, which: str) -> int:
        """Bytes read and written, of the kind that `which` names."""
        return sum(getattr(found, which) for side in (self.reads, self.writes) for found in side.values())


launches: list[Counts] = []


def _called(shared: ctypes.CDLL, kernel: Kernel, name: str) -> Callable[..., None]:
    def call(*args: Any, **options: Any) -> None:
        shared.shim_counts_reset()
        kernel(*args, **options)
        sides: tuple[dict[int, Traffic], dict[int, Traffic]] = ({}, {})
        for number, arg in enumerate(args):
            if isinstance(arg, Tensor):
                found = (ctypes.c_uint64 * 6)()
                shared.shim_counts_of(number, found)
                for side, values in zip(sides, (found[:3], found[3:]), strict=True):
                    if values[0]:
                        side[number] = Traffic(*values)
        rest = (ctypes.c_uint64 * 5)()
        shared.shim_counts_all(rest)
        launches.append(Counts(name, *sides, *rest))

    return call


class CountingLibrary(Library):
    """The kernels of one text for half; each launch is appended to `launches`."""

    def __init__(self, source: str) -> None:
        self._load(str(counting_library(source)))

    def __getattr__(self, name: str) -> Any:
        return _called(self.__dict__["_shared"], super().__getattr__(name), name)


@functools.cache
def compile_shader(source: str) -> CountingLibrary:
    """See `torch.mps.compile_shader`."""
    return CountingLibrary(source)
