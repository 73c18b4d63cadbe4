"""A stand-in for `torch.mps.compile_shader` that runs Metal text on the host, on CPU tensors.

How torch passes arguments (torch/csrc/mps/Module.cpp and aten/src/ATen/native/mps/OperationUtils.mm, 2.7 to 2.13; the
array of ints is from before 2.8, where arrays of tensors joined it):

- `compile_shader(text)` gives an object whose attributes are the kernels by their host_name; calling one encodes it.
- Arguments are positional: number i is bound to [[buffer(i)]].
- A tensor is its MTLBuffer with the byte offset of its first element; strides are not passed; None is refused.
- A Python int is an int64 and a float an fp32, copied (setBytes); a list or tuple is an array of them. `arg_casts`, a
  str for all or a dict by number, makes them fp16, bf16, int32, int16, int8 or uint8 instead.
- `threads` is the TOTAL number of threads, an int or up to three (x first); without it, the number of elements of the
  first tensor. `group_size` has as many numbers. What the group size does not divide is dispatched with
  smaller threadgroups at the far end (dispatchThreads).
- There is no way to give a threadgroup memory argument its length, hence arrays in the body.
- The language is Metal 3.1 on macOS 14, 3.1 or (torch >= 2.11) 3.2 on 15, 4.0 on 26; math mode "safe" with precise
  functions, fast with PYTORCH_MPS_FAST_MATH=1.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .build import library

ORDERS = {"random": 0, "in order": 1, "reverse": 2}


class LaunchError(Exception):
    """A kernel did what a GPU would not report: it names the kernel and the thread."""


class Schedule:
    """In which order fibers run, and whether fp32 numbers below 2^-126 are 0, as on Apple's GPUs."""

    def __init__(self) -> None:
        self.seed, self.order, self.flush = 1, "random", False
        self.launches: list[str] = []  # the kernels that ran, by name


schedule = Schedule()


class _Argument(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("is_tensor", ctypes.c_int))


def _tensor_bytes(tensor: Tensor) -> int:
    """From its first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _scalar(value: Any, cast: str | None) -> bytes:
    if isinstance(value, (list, tuple)):
        if not value:
            raise RuntimeError("Empty list/tuple can not be an argument to metal kernel")
        return b"".join(_scalar(element, cast) for element in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RuntimeError(f"Unsupported argument type {type(value).__name__}")
    if cast is None:
        return struct.pack("<f" if isinstance(value, float) else "<q", value)
    kinds = {"int32": "<i", "int16": "<h", "int8": "<b", "uint8": "<B", "fp16": "<e"}
    return struct.pack(kinds[cast], value)


def _sizes(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


class Kernel:
    """One kernel, called as torch's are."""

    max_threads_per_threadgroup = 1024
    thread_execution_width = 32

    def __init__(self, shared: ctypes.CDLL, number: int, name: str) -> None:
        self._shared, self._number, self._name = shared, number, name

    def __call__(
        self,
        *args: Any,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | dict[int, str] | None = None,
    ) -> None:
        given, kept = (_Argument * max(1, len(args)))(), []
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                if threads is None:
                    threads = arg.numel()
                given[i] = _Argument(arg.data_ptr(), _tensor_bytes(arg), 1)
                continue
            cast = arg_casts.get(i) if isinstance(arg_casts, dict) else arg_casts
            kept.append(ctypes.create_string_buffer(_scalar(arg, cast)))
            given[i] = _Argument(ctypes.addressof(kept[-1]), len(kept[-1]) - 1, 0)
        if threads is None:
            raise RuntimeError("Number of threads is undefined or has wrong dimension")
        total = _sizes(threads)
        sizes = [min(total[0], 1024), *[1] * (len(total) - 1)] if group_size is None else _sizes(group_size)
        if len(total) > 3 or len(sizes) != len(total):
            raise RuntimeError("threads and group_size must have the same one to three dimensions")
        ones = [1] * (3 - len(total))
        grid, group = (ctypes.c_uint32 * 3)(*total, *ones), (ctypes.c_uint32 * 3)(*sizes, *ones)
        order, schedule.seed = ORDERS[schedule.order], schedule.seed + 1
        schedule.launches.append(self._name)
        error = self._shared.shim_launch(
            self._number, given, len(args), grid, group, schedule.seed, order, int(schedule.flush)
        )
        if error is not None:
            raise LaunchError(f"{error.decode(errors='replace')} (seed {schedule.seed}, order {schedule.order})")


class Library:
    """The kernels of one text; `optimization` is the compiler's."""

    def __init__(self, source: str, optimization: str = "-O1") -> None:
        if not source.isascii():
            raise ValueError("Metal text is plain ASCII")
        self._load(str(library(source, optimization)))

    def _load(self, path: str) -> None:
        self._shared = ctypes.CDLL(path)
        self._shared.shim_kernel_name.restype = ctypes.c_char_p
        self._shared.shim_launch.restype = ctypes.c_char_p
        self._shared.shim_launch.argtypes = [
            *(ctypes.c_int, ctypes.POINTER(_Argument), ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_uint64, ctypes.c_int, ctypes.c_int),
        ]
        names = [self._shared.shim_kernel_name(i).decode() for i in range(self._shared.shim_kernel_count())]
        self._kernels = {name: Kernel(self._shared, i, name) for i, name in enumerate(names)}

    def __getattr__(self, name: str) -> Kernel:
        try:
            return self.__dict__["_kernels"][name]
        except KeyError:
            raise AttributeError(f"no kernel {name}") from None

    def __dir__(self) -> list[str]:
        return list(self._kernels)


@functools.cache
def compile_shader(source: str) -> Library:
    """See `torch.mps.compile_shader`."""
    return Library(source)


__all__ = ["Kernel", "LaunchError", "Library", "compile_shader", "schedule"]
