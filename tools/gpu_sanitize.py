"""Every CUDA kernel once on small shapes, for compute-sanitizer: what takes 1 second takes minutes under it.

compute-sanitizer --tool memcheck python tools/gpu_sanitize.py      (PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor
an allocation of its own, so that reading past its end is seen)

Results are compared too. Status 1: something was wrong; 2: no GPU.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from kernels import exact
from kernels.problems import Problem

from nybble import QuantConfig, QuantTensor
from nybble.backends import cuda
from nybble.formats import dynamic_map
from nybble.training.optim import AdamW, clip_scale

#: (out_features, in_features, rows): full tiles, edges, several blocks along k; the last two are for any alignment.
SHAPES = ((256, 512, 1), (264, 512, 9), (264, 1024, 40), (128, 256, 140), (65, 130, 20), (7, 33, 3))


def linear(device: torch.device, racecheck: bool) -> list[str]:
    """Runs every linear kernel wherever it can; returns what was wrong."""
    wrong, ran = [], set()
    for name in cuda.core().kernel_names().split(", "):
        cuda.core().force_kernel(name)
        dtype = torch.float32 if name == "linear_fp32" else torch.bfloat16
        for (n, k, m), grad, int8 in itertools.product(SHAPES, (False, True), (False, True)):
            if racecheck and int8:
                continue
            problem = exact.make(n, k, m, rank=16, bias=True, grad=grad, int8=int8, dtype=dtype, device=device)
            compute = int(name == "linear_int8" and not grad)
            if cuda.explain_linear(n, k, m, dtype, int8, grad, compute)["kernel"] != name:
                continue
            ran.add(name)
            if compute:
                weight = problem.packed._replace(compute=1)
                cuda.linear(problem.x, weight, problem.bias, problem.side, problem.side_weight)
                continue
            if not right(problem, name):
                wrong.append(f"{name}: {problem}")
    cuda.core().force_kernel("")
    print(f"linear kernels that ran: {', '.join(sorted(ran))}")
    return wrong


def right(problem: Problem, kernel: str) -> bool:
    """Whether the answer is exact; dequantize + matmul rounds between the product and the side path."""
    actual, answer = problem.run(), exact.answer(problem)
    if kernel == "dequantize + matmul":
        return bool((actual.float() - answer.float()).norm() <= 2.0**-7 * answer.float().norm())
    return torch.equal(actual, answer)


def codecs(device: torch.device) -> list[str]:
    """Quantizes and dequantizes in every format, aligned and not; compares with the CPU."""
    wrong = []
    for shape, format in itertools.product(((40, 128), (33, 65)), ("nf4", "int4", "int8")):
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        config = QuantConfig(format=format, double_quant=False)
        ours, theirs = (QuantTensor.quantize(weight.to(where), config) for where in (device, torch.device("cpu")))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            if not torch.equal(ours.dequantize(dtype).cpu(), theirs.dequantize(dtype)):
                wrong.append(f"{format} {shape} {dtype}")
        if format == "nf4":
            QuantTensor.quantize(weight.to(device), QuantConfig()).dequantize(torch.bfloat16)
            QuantTensor.quantize(weight.to(device), QuantConfig(search="mse"))
    codes, scales = cuda.quantize_8bit(torch.randn(1000, device=device), dynamic_map().to(device), 256)
    cuda.dequantize_8bit(codes, scales, dynamic_map().to(device), 256, torch.float32)
    return wrong


def optimizer(device: torch.device) -> None:
    """Two steps of both kinds of AdamW, and the norm of gradients."""
    for bits in (8, 32):
        parameters = [torch.nn.Parameter(torch.randn(*shape, device=device)) for shape in ((70, 65), (9,))]
        adamw = AdamW(parameters, bits=bits)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            adamw.step(grad_scale=clip_scale(parameters, 1.0)[1])


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_sanitize runs kernels on an NVIDIA GPU, and torch finds none here")
        return 2
    start, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    wrong = codecs(device)
    optimizer(device)
    wrong += linear(device, "--racecheck" in sys.argv)
    torch.cuda.synchronize()
    for line in wrong:
        print(f"WRONG: {line}")
    print(f"{len(wrong)} wrong, {time.monotonic() - start:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
