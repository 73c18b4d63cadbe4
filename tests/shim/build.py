"""Compiles the CUDA kernels as C++ for this machine, with the shim that runs them, into one extension module.

An object is compiled anew only if one of the files that it was made from has changed, so an unchanged tree costs
nothing; all of it lies under build/shim. `python tests/shim/build.py` says what it does.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "shim"
MODULE = "_cuda_shim"
CONTROL = "_cuda_shim_control"

COMPILER = shlex.split(os.environ.get("CXX", "c++"))
COMMON = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",  # whose longjmp takes leaving a fiber for an attack
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-DNYBBLE_SHIM",
    f"-DNYBBLE_CUDA_MODULE={MODULE}",
    "-I" + str(ROOT / "tests"),
    "-I" + str(ROOT / "csrc"),
]
# What a GPU would stop at, or get wrong in silence: misaligned accesses, indices and shifts beyond what there is,
# variables that are read before they are written. The handlers are in guards.cpp.
KERNEL = [
    "-O2",
    "-g1",
    "-x",
    "c++",
    "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero",
]
# Fills variables before their first write; compilers have it since GCC 12 and Clang 8.
FILLED = "-ftrivial-auto-var-init=pattern"
# Hooks at every write, for files with wgmma; see watch.h.
WATCHED = [*KERNEL, "-fsanitize=thread"]
SHIM = ["-O3", "-g1"]
BINDING = ["-O1", "-I" + pybind11.get_include(), "-I" + sysconfig.get_path("include")]


@functools.cache
def fills_variables() -> bool:
    """Whether a variable that a kernel reads before it writes it is found."""
    command = [*COMPILER, FILLED, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def _sources() -> list[tuple[Path, list[str]]]:
    """Each file and its own options."""
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) + sorted((ROOT / "tests" / "shim").glob("*.cu"))
    shim = [ROOT / "tests/shim/fibers.cpp", *sorted((ROOT / "tests/shim/cuda").glob("*.cpp"))]
    control = [path for path in shim if path.name == "control.cpp"]
    plain = [ROOT / "csrc/core/check.cpp", ROOT / "csrc/cuda/choose.cpp"]
    bindings = [ROOT / "csrc/bindings/cuda.cpp", ROOT / "csrc/bindings/status.cpp", *control]
    filled = [FILLED] if fills_variables() else []
    return [
        *((path, BINDING) for path in bindings),
        *((path, [*(WATCHED if "wgmma" in path.read_text() else KERNEL), *filled]) for path in kernels),
        *((path, SHIM) for path in [*shim, *plain] if path not in control),
    ]


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return "missing"


def _dependencies(depfile: Path) -> list[str]:
    """The files of this project that a make rule names."""
    text = depfile.read_text().replace("\\\n", " ").split(":", 1)[1]
    paths = {str(Path(word).resolve()) for word in text.split()}
    return sorted(path for path in paths if path.startswith(str(ROOT)) and "/.venv" not in path)


def _compile(source: Path, options: list[str], identity: str) -> tuple[Path, bool]:
    """The object and whether it is a new one."""
    name = "-".join(source.relative_to(ROOT).parts)
    output, record, depfile = (BUILD / (name + ending) for ending in (".o", ".json", ".d"))
    command = [*COMPILER, *COMMON, *options, "-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
    known = {}
    if output.exists() and record.exists():
        known = json.loads(record.read_text())
    digests: dict[str, str] = known.get("files", {})
    same = bool(digests) and known["command"] == command and known["compiler"] == identity
    if same and all(_digest(path) == digest for path, digest in digests.items()):
        return output, False
    record.unlink(missing_ok=True)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")
    if result.stderr and __name__ == "__main__":
        print(result.stderr, file=sys.stderr)
    files = {path: _digest(path) for path in _dependencies(depfile)}
    record.write_text(json.dumps({"command": command, "compiler": identity, "files": files}))
    return output, True


def build() -> Path:
    """The path of the module, compiled if need be."""
    BUILD.mkdir(parents=True, exist_ok=True)
    identity = subprocess.run([*COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    module = BUILD / (MODULE + sysconfig.get_config_var("EXT_SUFFIX"))
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The largest first; two at a time, which is what machines of few cores can do.
        sources = sorted(_sources(), key=lambda item: -item[0].stat().st_size)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda item: _compile(item[0], item[1], identity), sources))
        linked = json.dumps([str(path) for path, _ in objects])
        record = BUILD / "module.json"
        if any(new for _, new in objects) or not module.exists() or not record.exists() or record.read_text() != linked:
            record.unlink(missing_ok=True)
            temporary = module.with_suffix(".tmp")
            command = [*COMPILER, "-shared", "-o", str(temporary), *(str(path) for path, _ in objects)]
            result = subprocess.run([*command, "-Wl,--no-undefined-version"], capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(result.stderr)
            temporary.replace(module)
            record.write_text(linked)
    return module


def _load(name: str, path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def load() -> tuple[ModuleType, ModuleType]:
    """The kernels' bindings, as `nybble._cuda`, and what controls the shim; one file has both."""
    path = build()
    return _load(MODULE, path), _load(CONTROL, path)


if __name__ == "__main__":
    print(build())
