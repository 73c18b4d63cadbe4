"""What the process holds and is told: one OpenMP runtime, the forced instruction set, `explain`, a quiet import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble import LoRALinear, QuantConfig, QuantLinear, _core, explain
from nybble.errors import FormatError

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own, with warnings as errors, which must succeed."""
    variables = {key: value for key, value in os.environ.items() if key != "NYBBLE_FORCE_ISA"}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**variables, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


# ---- OpenMP ----------------------------------------------------------------------------------------------------------

RUNTIMES = """
import json
import nybble
import torch
layer = nybble.QuantLinear.from_linear(torch.nn.Linear(64, 64))
layer(torch.randn(64, 64))
import threadpoolctl
pools = [pool["filepath"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "openmp"]
maps = open("/proc/self/maps").read().splitlines()
paths = {line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6}
mapped = [path for path in paths if any(name in path for name in ("libgomp", "libomp", "libiomp"))]
print(json.dumps([pools, mapped]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_is_in_the_process() -> None:
    pytest.importorskip("threadpoolctl")
    pools, mapped = json.loads(python(RUNTIMES).stdout)
    assert len(set(mapped)) == 1
    assert [os.path.realpath(path) for path in pools] == [os.path.realpath(path) for path in mapped]


# ---- instruction sets ------------------------------------------------------------------------------------------------

FORCED = """
import nybble, torch
print(nybble.active_isa(), nybble.explain((64, 64), m=1).isa, nybble.explain((64, 64), m=64, grad_input=True).isa)
nybble.QuantLinear.from_linear(torch.nn.Linear(64, 64))(torch.randn(9, 64))
"""


@pytest.mark.parametrize("name", _core.isas())
def test_the_forced_instruction_set_is_the_one_that_runs(name: str) -> None:
    assert python(FORCED, NYBBLE_FORCE_ISA=name).stdout.split() == [name] * 3


def test_without_a_forced_one_the_first_is_chosen() -> None:
    assert python("import nybble; print(nybble.active_isa() == nybble.isas()[0])").stdout.strip() == "True"


UNKNOWN = """
import nybble, torch
from nybble import QuantLinear
assert nybble.isas()
for call in (nybble.active_isa, lambda: QuantLinear.from_linear(torch.nn.Linear(4, 4)), lambda: nybble.explain((4, 4))):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_an_unknown_forced_instruction_set_is_an_error_at_first_use_not_at_import() -> None:
    lines = python(UNKNOWN, NYBBLE_FORCE_ISA="sse9").stdout.splitlines()
    expected = "NYBBLE_FORCE_ISA=sse9 names no instruction set of this machine; it has: " + ", ".join(_core.isas())
    assert lines == [expected] * 3


def test_switching_names_the_one_before_and_refuses_others(isa: str) -> None:
    assert _core.set_active_isa("scalar") == isa
    assert _core.active_isa() == "scalar"
    with pytest.raises(ValueError, match=r"cannot run 'neon9'; it has: .*scalar"):
        _core.set_active_isa("neon9")
    assert _core.active_isa() == "scalar"


def test_scalar_runs_everywhere() -> None:
    assert "scalar" in nybble.isas()
    assert len(set(nybble.isas())) == len(nybble.isas())


def test_no_instruction_set_flag_reaches_the_compiler() -> None:
    # Each instruction set opens a target region in its own file. A flag would let the compiler use it everywhere.
    lines = (ROOT / "CMakeLists.txt").read_text().splitlines()
    for line in lines:
        words = line.split("#")[0].replace("<", " ").replace(">", " ").replace('"', " ").replace(";", " ").split()
        flags = [word for word in words if word.startswith(("-m", "/arch", "-x", "-Ofast", "-ffast-math"))]
        assert not flags, line


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_explain_tells_the_kernel_of_a_shape(isa: str) -> None:
    tiles = isa == "amx"  # bf16 only
    small, large = explain((64, 128), m=2), explain((64, 128), m=9)
    assert (small.kernel, large.kernel) == ("linear_small_m", "linear_tiles_few" if tiles else "linear_panel")
    assert explain((64, 128), m=33).kernel == ("linear_tiles" if tiles else "linear_panel")
    assert explain((64, 128), m=9, block_size=32).kernel == ("linear_tiles" if tiles else "linear_panel")
    assert small.isa == large.isa == isa
    assert small.compute == "fp32"
    assert large.compute == ("bf16 pairs, fp32 accumulation" if isa in ("amx", "avx512bf16", "neonbf16") else "fp32")
    assert explain((64, 128), m=9, dtype=torch.float32).compute == "fp32"
    assert explain((64, 128), m=9, dtype=torch.float16).compute == "fp32"
    assert explain((64, 128), m=9, dtype=torch.float32).kernel == "linear_panel"
    assert explain((64, 128), m=1, grad_input=True).kernel == ("linear_tiles" if tiles else "linear_panel")
    assert explain((64, 124), m=1).kernel == "linear_panel"
    assert explain((64, 127), m=1, format="int8").kernel == "linear_small_m"
    assert "multiple of 8" in explain((64, 124), m=1).reason
    assert small.threads == torch.get_num_threads()


def test_a_forced_kernel_runs_where_it_can(isa: str) -> None:
    assert _core.force_kernel("linear_panel") == ""
    try:
        assert explain((64, 128), m=1).kernel == "linear_panel"
        assert _core.force_kernel("linear_small_m") == "linear_panel"
        assert explain((64, 128), m=8).kernel == "linear_small_m"
        assert explain((64, 128), m=9).kernel != "linear_small_m"
        with pytest.raises(ValueError, match="there is no kernel 'gemm'; allowed: linear_small_m, linear_panel"):
            _core.force_kernel("gemm")
    finally:
        _core.force_kernel("")


def test_the_forced_kernel_is_read_from_the_environment() -> None:
    script = "import nybble; print(nybble.explain((64, 128), m=1).kernel)"
    assert python(script, NYBBLE_FORCE_KERNEL="linear_panel").stdout.strip() == "linear_panel"
    failed = """
import nybble
try:
    nybble.explain((64, 128))
except ValueError as error:
    print(error)
"""
    said = python(failed, NYBBLE_FORCE_KERNEL="gemm").stdout.strip()
    assert said.startswith("NYBBLE_FORCE_KERNEL=gemm names no kernel; allowed: linear_small_m")


def test_explain_of_a_module_is_that_of_its_shape_and_format() -> None:
    config = QuantConfig(format="int8", double_quant=False)
    layer = QuantLinear.from_linear(nn.Linear(31, 8), config)
    assert explain(layer, m=3) == explain((8, 31), m=3, format="int8")
    assert explain(LoRALinear.from_base(layer, 2, 4.0), m=3) == explain(layer, m=3)
    custom = QuantLinear.from_linear(nn.Linear(32, 8), QuantConfig(format=tuple(range(16))))
    assert explain(custom).format == "custom"
    text = str(explain(layer, m=3))
    assert "[3, 31] x [8, 31] int8" in text
    assert "linear_small_m" in text


def test_explain_of_another_device_says_what_runs_there() -> None:
    found = explain((8, 8), device="meta")
    assert (found.kernel, found.isa) == ("dequantize + matmul", "torch")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (((4, 4), 1, torch.float64), TypeError, r"dtype is torch\.float64; allowed"),
        (((4, 4), -1), ValueError, "m is -1"),
        (((4, 4), True), ValueError, "m is True"),
        (((4, 4), 1.5), ValueError, r"m is 1\.5"),
        (((-4, 4),), ValueError, r"shape is \(-4, 4\)"),
        ((nn.Linear(4, 4),), TypeError, "module is a Linear; a QuantLinear"),
        ((LoRALinear.from_base(nn.Linear(4, 4), 1, 1.0),), TypeError, "module is a Linear"),
        (((4, 4, 4),), TypeError, r"module_or_shape is \(4, 4, 4\)"),
        ((7,), TypeError, "module_or_shape"),
    ],
)
def test_explain_refuses_bad_input(arguments: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        explain(*arguments)


def test_explain_refuses_an_unknown_format() -> None:
    with pytest.raises(FormatError, match="nf5"):
        explain((4, 4), format="nf5")


# ---- import ----------------------------------------------------------------------------------------------------------

HEAVY = (
    "transformers",
    "gguf",
    "matplotlib",
    "bitsandbytes",
    "peft",
    "tokenizers",
    "datasets",
    "accelerate",
    "torch._dynamo",
)


def test_import_is_quiet_and_brings_nothing_along() -> None:
    # Every public name is resolved, so that nothing is hidden behind loading on first use.
    code = f"""
import sys
import nybble
for name in nybble.__all__:
    getattr(nybble, name)
assert sorted(set(nybble.__all__)) == nybble.__all__
present = [name for name in {HEAVY!r} if name in sys.modules]
assert not present, present
"""
    result = python(code)
    assert (result.stdout, result.stderr) == ("", "")


def test_import_probes_no_network_and_no_device() -> None:
    code = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("the network was asked for")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
import nybble
nybble.QuantLinear
import torch
assert not torch.cuda.is_initialized()
"""
    python(code)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        nybble.quantise  # noqa: B018
    assert set(nybble.__all__) <= set(dir(nybble))
