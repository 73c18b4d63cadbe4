"""What is raced on a GPU: nybble's kernels, cuBLAS on the unquantized weight, bitsandbytes; all from one bf16 weight.

Each is made of copies of its own weight. `check` compares with the product of the weight that is stood for, so that
nothing is raced that computes something else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from cuda_timing import Contestant, Gpu, copies_for
from torch import Tensor

from nybble import QuantConfig, QuantTensor, ops
from nybble.backends import BoundWeight, PackedWeight, cuda

RANK = 16
DEQUANTIZE = "dequantize + matmul"
#: Rows that are compared with the product of the dense weight.
CHECKED_ROWS = 64
#: Relative error (Frobenius) that bf16 explains: its unit for the weight, for the output, and for one more rounding.
TOLERANCE = 3 * 2.0**-8


class Missing(Exception):
    """A peer that cannot take part, and why."""


@contextmanager
def forced(gpu: Gpu, kernel: str) -> Iterator[None]:
    """Inside, nybble's calls run `kernel` where it can."""
    if gpu.dry:
        yield
        return
    previous = cuda.core().force_kernel(kernel)
    try:
        yield
    finally:
        cuda.core().force_kernel(previous)


def with_kernel(gpu: Gpu, kernel: str, contestant: Contestant) -> Contestant:
    """The same, `kernel` forced in every call (a captured graph keeps it)."""

    def call(index: int) -> Tensor:
        with forced(gpu, kernel):
            return contestant.call(index)

    return replace(contestant, call=call)


def clones(tensor: QuantTensor, count: int) -> list[QuantTensor]:
    """`count` copies in memory of their own."""

    def one() -> QuantTensor:
        values = {f.name: getattr(tensor, f.name) for f in fields(tensor)}
        return replace(tensor, **{k: v.clone() for k, v in values.items() if isinstance(v, Tensor)})

    return [one() for _ in range(count)]


class Weight:
    """One weight [n, k] in all its shapes.

    Attributes:
        dense: bf16 copies. tensors: NF4 (block 64, double-quantized) copies. packed: these as kernels take them.
        standing: bf16, what the NF4 copies stand for.
    """

    def __init__(self, gpu: Gpu, n: int, k: int, config: QuantConfig | None = None) -> None:
        self.gpu, self.n, self.k = gpu, n, k
        torch.manual_seed(n + k)
        weight = torch.randn(n, k, device=gpu.device, dtype=torch.bfloat16) * 0.02
        rotation = 1 << 14 if gpu.dry else 200 << 20
        self.dense = [weight, *(weight.clone() for _ in range(copies_for(2 * n * k, rotation) - 1))]
        tensor = QuantTensor.quantize(weight, config)
        self.nbytes = tensor.nbytes
        self.rotation = rotation
        self.tensors = clones(tensor, copies_for(tensor.nbytes, rotation))
        self.packed: list[PackedWeight] = [BoundWeight.of(t.packed_weight()) for t in self.tensors]
        self.standing = tensor.dequantize(torch.bfloat16)

    # ---- forward and grad_input ----

    def cublas(self, x: Tensor, grad: bool) -> Contestant:
        """torch's product on the unquantized weight."""
        return Contestant(lambda i: x @ (self.dense[i] if grad else self.dense[i].t()), len(self.dense))

    def nybble(self, x: Tensor, grad: bool, rank: int = 0) -> Contestant:
        """The kernel, with a side path of `rank` if that is above 0."""
        side = side_weight = None
        if rank:
            columns = self.k if grad else self.n
            shape = (rank, columns) if grad else (columns, rank)
            side = torch.randn(x.shape[0], rank, device=x.device, dtype=x.dtype) * 0.1
            side_weight = torch.randn(*shape, device=x.device) * 0.1

        def call(index: int) -> Tensor:
            if grad:
                return ops.grad_input(x, self.packed[index], side, side_weight)
            return ops.linear(x, self.packed[index], None, side, side_weight)

        return Contestant(call, len(self.packed))

    def lora(self, x: Tensor) -> Contestant:
        """The whole of lora_linear: x A^T by torch, then the kernel with its side path; fp32 factors, as by default."""
        a = torch.randn(RANK, self.k, device=x.device) * 0.01
        b = torch.randn(self.n, RANK, device=x.device) * 0.01
        return Contestant(lambda i: ops.lora_linear(x, self.packed[i], None, a, b, 2.0), len(self.packed))

    def dequantized(self, x: Tensor, grad: bool) -> Contestant:
        """One launch of nybble's dequantize into a buffer, then torch's product."""
        buffer = torch.empty_like(self.dense[0])

        def call(index: int) -> Tensor:
            self.tensors[index].dequantize(out=buffer)
            return x @ (buffer if grad else buffer.t())

        return Contestant(call, len(self.tensors))

    def check(self, name: str, contestant: Contestant, x: Tensor, grad: bool, right: Tensor | None = None) -> None:
        """Raises Missing unless the first copy computes what it should (for no side path)."""
        right = self.standing if right is None else right
        rows = slice(0, CHECKED_ROWS)
        expected = x[rows].float() @ (right.float() if grad else right.float().t())
        actual = contestant.call(0)[rows].float()
        error = ((actual - expected).norm() / expected.norm()).item()
        if not error <= TOLERANCE:
            raise Missing(f"WRONG: {name} computes something else, relative error {error:.3g}")

    # ---- codecs ----

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Contestant:
        out = torch.empty(self.n, self.k, dtype=dtype, device=self.gpu.device)
        return Contestant(lambda i: self.tensors[i].dequantize(out=out), len(self.tensors))

    def quantize(self) -> Contestant:
        """4 bits, block 64, plain scales: one kernel. Captured, so that it is not waited for."""
        codes = QuantConfig().codebook.to(self.gpu.device)
        backend = self._backend()
        return Contestant(lambda i: backend.quantize_4bit(self.dense[i], codes, 64)[0], len(self.dense))

    def quantize_nested(self) -> Contestant:
        """With double quantization, as `QuantTensor.quantize` does it."""
        return Contestant(lambda i: QuantTensor.quantize(self.dense[i]).packed, len(self.dense))

    def _backend(self) -> object:
        from nybble import backends

        return backends.of(self.gpu.device)


def bitsandbytes() -> object:
    """The package where it is installed for this GPU; Missing where not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes as package
    except Exception as error:
        raise Missing(f"bitsandbytes: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    return package


class BitsAndBytes:
    """The same weight, quantized by bitsandbytes in the same format."""

    def __init__(self, weight: Weight) -> None:
        self.package = bitsandbytes()
        functional = self.package.functional
        self.weight = weight
        count = copies_for(weight.nbytes, weight.rotation)
        try:
            made = [
                functional.quantize_4bit(weight.dense[0], blocksize=64, compress_statistics=True, quant_type="nf4")
                for _ in range(count)
            ]
        except Exception as error:
            raise Missing(f"bitsandbytes cannot quantize here: {str(error).splitlines()[0]}") from error
        self.made = made
        self.standing = functional.dequantize_4bit(*made[0])

    def forward(self, x: Tensor) -> Contestant:
        """matmul_4bit without gradient, which chooses its own kernel by the number of rows."""
        matmul = self.package.matmul_4bit

        def call(index: int) -> Tensor:
            data, state = self.made[index]
            with torch.no_grad():
                return matmul(x, data.t(), quant_state=state)

        return Contestant(call, len(self.made))

    def grad_input(self, g: Tensor) -> Contestant:
        """What its backward does: dequantize, then a product."""
        functional = self.package.functional
        return Contestant(lambda i: g @ functional.dequantize_4bit(*self.made[i]), len(self.made))

    def dequantize(self) -> Contestant:
        functional = self.package.functional
        out = torch.empty_like(self.weight.dense[0])
        return Contestant(lambda i: functional.dequantize_4bit(*self.made[i], out=out), len(self.made))

    def quantize(self) -> Contestant:
        functional, dense = self.package.functional, self.weight.dense
        return Contestant(
            lambda i: functional.quantize_4bit(dense[i], blocksize=64, compress_statistics=False, quant_type="nf4")[0],
            len(dense),
        )


def kernels_that_run(gpu: Gpu, n: int, k: int, m: int, dtype: torch.dtype, grad: bool) -> list[str]:
    """The names of nybble's kernels that can run the problem, by asking each while it is forced."""
    if gpu.dry:
        return ["linear_mma", DEQUANTIZE]
    found = []
    for name in cuda.core().kernel_names().split(", "):
        with forced(gpu, name):
            if cuda.explain_linear(n, k, m, dtype, False, grad)["kernel"] == name:
                found.append(name)
    return found


def chosen(gpu: Gpu, n: int, k: int, m: int, dtype: torch.dtype, grad: bool) -> str:
    """The name of the kernel that runs by itself."""
    return "linear_mma" if gpu.dry else cuda.explain_linear(n, k, m, dtype, False, grad)["kernel"]


def attempt(notes: list[str], make: Callable[[], Contestant]) -> Contestant | None:
    """make(), or None and a note."""
    try:
        return make()
    except (Missing, RuntimeError, ValueError, TypeError, AttributeError) as error:
        note = str(error).splitlines()[0] if str(error) else type(error).__name__
        if note not in notes:
            notes.append(note)
        return None
