"""nybble.merge(absorb=True): codes rounded so that what an update does survives."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from adapters_on_disk import Make, write_adapter, write_factors, write_weights
from kill_campaign import digest
from safetensors.torch import load_file, save_file

import nybble
from nybble import QuantConfig
from nybble.checkpoint.absorb import orthonormal


def test_absorb_keeps_what_the_update_does(make: Make, tmp_path: Path) -> None:
    nybble.quantize(make(dtype=torch.float32), tmp_path / "base", QuantConfig("nf4", block_size=32))
    adapter = write_adapter(tmp_path / "base", tmp_path / "adapter")
    for path in (adapter / "adapter_model.safetensors",):  # an update far below a quantization step
        save_file({n: t * (0.1 if "lora_B" in n else 1) for n, t in load_file(path).items()}, path)
    base = tmp_path / "base"
    nybble.merge(base, adapter, tmp_path / "exact", "fp32")
    nybble.merge(base, adapter, tmp_path / "nearest", "nf4")
    report = nybble.merge(base, adapter, tmp_path / "absorbed", "nf4", absorb=True)
    again = nybble.merge(base, adapter, tmp_path / "again", "nf4", absorb=True, workers=1, max_memory=80e6)
    assert digest(tmp_path / "absorbed") == digest(tmp_path / "again")
    assert report.rows == again.rows
    exact = nybble.load(tmp_path / "exact")
    factors = load_file(adapter / "adapter_model.safetensors")
    lost: dict[str, list[float]] = {"nearest": [], "absorbed": []}
    for name, values in lost.items():
        model = nybble.load(tmp_path / name)
        for row in report.rows:
            path = row.name.removesuffix(".weight")
            difference = model.get_submodule(path).dequantize(torch.float32) - exact.get_submodule(path).weight
            a, b = (factors[f"base_model.model.{path}.lora_{f}.weight"] for f in "AB")
            values.append(((difference @ a.T).norm() / (2 * b @ a @ a.T).norm()).item())
            if name == "absorbed":
                error = (difference.norm() / exact.get_submodule(path).weight.norm()).item()
                assert row.error == pytest.approx(error, rel=1e-3)
    assert sum(lost["absorbed"]) < 0.6 * sum(lost["nearest"])
    nybble.merge(base, adapter, tmp_path / "other", "int4", absorb=True)
    for settings in ({"onto": make("plain", dtype=torch.float32)}, {}):
        with pytest.raises(ValueError, match="absorb is for the dequantized weights of a quantized base"):
            nybble.merge(
                base if settings else tmp_path / "plain", adapter, tmp_path / "x", "nf4", absorb=True, **settings
            )
    with pytest.raises(ValueError, match=r"absorb is for a 4-bit result \(nf4, fp4, int4\); to is 'int8'"):
        nybble.merge(base, adapter, tmp_path / "x", "int8", absorb=True)


@pytest.mark.parametrize("shape", [(5, 3000), (40, 40), (30, 17), (1, 9)])
def test_orthonormal_rows_of_the_same_span(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    a = torch.randn(shape) * torch.logspace(0, -3, shape[0])[:, None]
    rows = orthonormal(a.clone())
    rank = int(torch.linalg.matrix_rank(a.double(), rtol=1e-6))
    assert rows.shape == (rank, shape[1])
    identity = torch.eye(rank)
    torch.testing.assert_close(rows @ rows.T, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(a @ rows.T @ rows, a, rtol=0, atol=1e-5 * a.norm().item())
    assert orthonormal(torch.zeros(shape)).shape == (0, shape[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM")
def test_absorbing_a_high_rank_keeps_to_the_least_memory_that_it_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nybble.quantize(write_weights(tmp_path / "w", fc__weight=torch.randn(64, 8192).bfloat16()), tmp_path / "base")
    adapter = write_factors(tmp_path / "adapter", fc=(torch.randn(512, 8192), torch.randn(64, 512)))
    program = """
        import sys, torch, nybble
        from nybble.checkpoint.absorb import orthonormal
        base, adapter, out = sys.argv[1:]
        nybble.QuantTensor.quantize(torch.randn(64, 64), nybble.QuantConfig()).dequantize()
        orthonormal(torch.randn(4, 64))  # what the library of linear algebra takes once
        try:
            nybble.merge(base, adapter, out, "nf4", absorb=True, max_memory=1e6, workers=1)
        except nybble.errors.CheckpointError as error:
            least = int(str(error).rpartition("at least ")[2].replace(",", ""))

        def peak():
            return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10

        before = peak()
        nybble.merge(base, adapter, out, "nf4", absorb=True, max_memory=least, workers=1)
        print(peak() - before, least)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), tmp_path / "base", adapter, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used, least = map(int, done.stdout.split())
    assert used < least < 250e6
