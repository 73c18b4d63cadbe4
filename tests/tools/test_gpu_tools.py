"""What is for machines with a GPU, exercised without one: a typing error must not cost minutes of GPU time."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))
cuda_report: Any = importlib.import_module("cuda_report")

SAID = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN1a12_GLOBAL__N_11kIfLi4EEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN1a12_GLOBAL__N_11kIfLi4EEEvPT_
    16 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 16 bytes cumulative stack size, 1024 bytes smem
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_report_reads_what_the_compiler_says() -> None:
    (kernel,) = cuda_report.resources(SAID, "k.cu", "sm_90a").values()
    assert (kernel.registers, kernel.shared, kernel.stack, kernel.spills) == (168, 1024, 16, 64)


def test_no_script_hides_a_package() -> None:
    """A script's folder comes first in the path: torch's optional `cuda.bindings` would be bench/cuda.py."""
    hidden = {"cuda", *(name for name in sys.stdlib_module_names)}
    assert not hidden & {
        script.stem for folder in ("bench", "tools", "examples") for script in (ROOT / folder).glob("*.py")
    }
    done = run("bench/gallery.py", "--help")
    assert done.returncode == 0, done.stderr


def test_sizes_of_a_wheel_are_those_of_its_shared_objects(tmp_path: Path) -> None:
    wheel = tmp_path / "nybble-1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:  # stored as it is, so nothing is compressed
        for name, size in (
            ("_core.abc.so", 30),
            ("_core.pyi", 7),
            ("_cuda.abc.so", 200),
            ("_cuda.pyi", 7),
            ("ops.py", 5),
        ):
            archive.writestr(f"nybble/{name}", b"x" * size)
    found = cuda_report.wheel_sizes(wheel)
    size = wheel.stat().st_size
    assert found == {
        "wheel": size,
        "_core": 30,
        "_core in the wheel": 30,
        "_cuda": 200,
        "_cuda in the wheel": 200,
        "wheel without CUDA": size - 200,
    }


def test_names_are_short() -> None:
    full = "void nybble::cuda::(anonymous namespace)::tile<nybble::Bf16, (int)4, (bool)1>(nybble::cuda::Args<3>, int)"
    assert cuda_report.short_name(full) == "tile<Bf16, 4, 1>"


@pytest.mark.parametrize("mode", [[], ["--sweep"]], ids=["targets", "sweep"])
def test_every_line_of_the_bench_runs(mode: list[str], tmp_path: Path) -> None:
    # Peers and the QLoRA step take a minute to import: `tools/gpu_check.sh --without-gpu` has them.
    done = run("bench/cuda_kernels.py", "--dry-run", "--no-peers", "--json", str(tmp_path / "out.json"), *mode)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the numbers mean nothing" in done.stdout and len(done.stdout) < 8000
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert {case["op"] for case in cases} >= (
        {"linear", "grad_input"} if mode else {"linear", "dequantize", "quantize"}
    )
    assert "WRONG" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_sentence_and_status_2() -> None:
    done = run("bench/cuda_kernels.py")
    assert done.returncode == 2 and done.stdout.count("\n") == 1 and not done.stderr


def test_wrong_arguments_are_refused() -> None:
    done = subprocess.run(["bash", str(ROOT / "tools/gpu_check.sh"), "--nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "gpu_check.sh [--out DIR]" in done.stderr
