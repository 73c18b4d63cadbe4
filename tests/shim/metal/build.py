"""Metal text to a shared object that runs it: transformed a little, compiled by g++, cached by its content.

What is done to the text, and nothing else:

- `threadgroup T name[n];` in a kernel's body becomes SHIM_ARRAY(T, name, [n]): C++ cannot tell it from a parameter.
- `template [[host_name("x")]] [[kernel]] decltype(f<A>) f<A>;` becomes SHIM_KERNEL("x", f_parameters, f<A>), which puts
  the kernel into a table; f_parameters says where f's parameters come from, as their attributes do.
- The body of a template begins with SHIM_PLAIN(T): T must not be deduced as volatile, which would hide a wrong space.
- `constant constexpr` becomes `static constexpr`: in the pass that checks `constant`, that is volatile.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
CACHE = TESTS.parent / "build" / "shim" / "metal"

_INCLUDES = [f"-I{TESTS}", f"-I{TESTS / 'shim' / 'metal'}"]
SPACES = {"device": 1, "threadgroup": 2, "constant": 3}
_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"]
# Attributes and pragmas are Metal's; a variable that one instantiation of a template does not use is no mistake.
_KERNEL_FLAGS = ["-Wall", "-Wextra", "-Wno-attributes", "-Wno-unknown-pragmas", "-Wno-unused"]
# What a GPU would stop at, or get wrong in silence; the handlers are in runner.cpp.
_CHECKS = ["-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero"]
_RUNNER = ("fibers.cpp", "metal/runner.cpp")


class CompileError(Exception):
    """What Metal's compiler would have refused, or this one did."""


def compiler() -> str:
    """The C++ compiler; CXX says another."""
    return os.environ.get("CXX", "g++")


def _machine_flags() -> list[str]:
    """Fused multiply-adds and half precision as instructions where the machine has them."""
    if platform.machine() != "x86_64":
        return []
    flags = set(re.findall(r"\b(?:fma|f16c)\b", Path("/proc/cpuinfo").read_text(encoding="utf-8")))
    return ["-mfma", "-mf16c"] if flags == {"fma", "f16c"} else []


def transformed(source: str) -> str:
    """The text as g++ takes it."""
    source = source.replace("constant constexpr", "static constexpr")
    source = re.sub(r"^(\s+)threadgroup (\w+) (\w+)((?:\[[^;]*\])+);", r"\1SHIM_ARRAY(\2, \3, \4);", source, flags=re.M)
    source = re.sub(r"^(template <typename T\b[^{]*\{)$", r"\1 SHIM_PLAIN(T)", source, flags=re.M)
    tables = []
    for match in re.finditer(r"^kernel void (\w+)\(", source, flags=re.M):
        parameters, depth, start = [], 1, match.end()
        for at in range(match.end(), len(source)):
            character = source[at]
            depth += (character in "(<") - (character in ")>")
            if depth == 0 or (depth == 1 and character == ","):
                parameters.append(source[start:at])
                start = at + 1
            if depth == 0:
                break
        entries = []
        for parameter in parameters:
            attribute = re.search(r"\[\[(\w+)(?:\((\d+)\))?\]\]", parameter)
            if attribute is None:
                raise CompileError(f"{match[1]}: the parameter {parameter.strip()!r} has no attribute")
            entries.append(f'{{"{attribute[1]}", {attribute[2] or 0}}}')
        tables.append(f"static const shim::Parameter {match[1]}_parameters[] = {{{', '.join(entries)}}};")

    def instantiation(match: re.Match[str]) -> str:
        if re.sub(r"\s+", "", match[2]) != re.sub(r"\s+", "", match[3]):
            raise CompileError(f"decltype({match[2]}) {match[3]}: not the same kernel")
        name = re.match(r"\w+", match[2])
        assert name is not None
        lines = "\\\n" * match[0].count("\\\n")  # so that errors keep their lines
        return f"SHIM_KERNEL({match[1]}, {name[0]}_parameters, {match[2]}){lines}"

    pattern = r"template\s+\[\[host_name\(([^)]*)\)\]\]\s+\[\[kernel\]\][\s\\]*decltype\(([^)]*)\)\s*([^;\\]*);"
    source = re.sub(pattern, instantiation, source)
    first = re.search(r"^using namespace metal;$", source, flags=re.M)
    if first is None:
        raise CompileError("the text does not say `using namespace metal;`")
    return source[: first.end()] + " " + " ".join(tables) + source[first.end() :]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")


def _headers() -> bytes:
    here = [TESTS / "shim" / "fibers.h", *sorted((TESTS / "shim" / "metal").glob("*"))]
    return b"".join(path.read_bytes() for path in here if path.suffix in ("", ".h") and path.is_file())


def _cached(name: str, key: bytes, make: list[str], inputs: str | None = None) -> Path:
    """The file that `make` writes to the place of "OUT", from the text at that of "IN", once for each key."""
    digest = hashlib.sha256(b"\0".join((key, _headers(), " ".join(make).encode()))).hexdigest()[:20]
    target = CACHE / f"{Path(name).stem}-{digest}{Path(name).suffix}"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            source, out = Path(folder) / "kernels.cpp", Path(folder) / name
            if inputs is not None:
                source.write_text(inputs, encoding="utf-8")
            names = {"OUT": str(out), "IN": str(source)}
            _run([names.get(part, part) for part in make])
            if not out.exists():
                out.write_bytes(b"")  # a pass that only checks
            out.replace(target)
    return target


def runner(*more: str) -> list[Path]:
    """The objects that every library is linked with."""
    objects = []
    for name in (*_RUNNER, *more):
        path = TESTS / "shim" / name
        command = [
            compiler(),
            *_FLAGS,
            "-U_FORTIFY_SOURCE",
            "-Wall",
            "-Wextra",
            "-O2",
            f"-I{TESTS}",
            "-c",
            str(path),
            "-o",
            "OUT",
        ]
        objects.append(_cached(f"{path.stem}.o", path.read_bytes(), command))
    return objects


def library(source: str, optimization: str = "-O1") -> Path:
    """The shared object of one text that compile_shader would take."""
    text = transformed(source)
    poison = "-ftrivial-auto-var-init=pattern"  # of variables that are read before they are written
    flags = [*_FLAGS, *_machine_flags(), *_KERNEL_FLAGS, *_CHECKS, poison, optimization, *_INCLUDES]
    kernels = _cached("kernels.o", text.encode(), [compiler(), *flags, "-c", "IN", "-o", "OUT"], text)
    objects = [str(path) for path in (kernels, *runner())]
    return _cached("library.so", kernels.name.encode(), [compiler(), "-shared", *objects, "-o", "OUT"])


def counting_library(source: str) -> Path:
    """The same, which counts what kernels do instead of checking them (counts.cpp), for half only."""
    source = re.sub(r"^\w+\((?:float|bfloat)\)$", "", source, flags=re.M)
    text = re.sub(r"\bfloat(4?)\b", r"counted\1", transformed(source))
    text = text.replace("using namespace metal;", '#include "shim/metal/counted.h"\nusing namespace metal;', 1)
    flags = [*_FLAGS, *_machine_flags(), *_KERNEL_FLAGS, "-fsanitize=thread", "-O1", *_INCLUDES]
    kernels = _cached("counting.o", text.encode(), [compiler(), *flags, "-c", "IN", "-o", "OUT"], text)
    objects = [str(path) for path in (kernels, *runner("metal/counts.cpp"))]
    return _cached("counting.so", kernels.name.encode(), [compiler(), "-shared", *objects, "-o", "OUT"])


def check_space(source: str, space: str) -> None:
    """Raises CompileError where a pointer to `space` (device, threadgroup or constant) lacks it or has it wrongly."""
    text = transformed(source)
    flags = [*_FLAGS, *_KERNEL_FLAGS, "-Werror=cast-qual", f"-DSHIM_SPACE={SPACES[space]}", *_INCLUDES]
    _cached(f"{space}.ok", text.encode(), [compiler(), *flags, "-fsyntax-only", "IN"], text)


# ---- clang, where there is one ---------------------------------------------------------------------------------------


@functools.cache
def clang() -> list[str] | None:
    """A clang that has __bf16 (17 or newer): the system's, or the package ziglang's; None: there is neither."""
    for command in (["clang++"], [sys.executable, "-m", "ziglang", "c++"]):
        try:
            found = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
        except OSError:
            continue
        version = re.search(r"clang version (\d+)", found)
        if version is not None and int(version[1]) >= 17:
            return command
    return None


def check_spaces(source: str) -> None:
    """Raises CompileError for any pointer of a wrong address space, and for what C++14 or clang does not take."""
    text = source.replace("constant constexpr", "static constexpr")
    text = re.sub(r"^#include <metal_\w+>$", '#include "shim/metal/spaces.h"', text, flags=re.M)
    array = r"\1typedef threadgroup \2 \3_array\4; \3_array& \3 = *(\3_array*)threadgroup_array();"
    text = re.sub(r"^(\s+)threadgroup (\w+) (\w+)((?:\[[^;]*\])+);", array, text, flags=re.M)
    text = re.sub(r"\b(?:vec<(\w+), 4>|(float)4)\(", r"make_vec<\1\2>(", text).replace("ulong2(", "make_ulong2(")
    text = re.sub(
        r"template\s+\[\[host_name\([^)]*\)\]\]\s+\[\[kernel\]\]([\s\\]*)decltype", r"template\1decltype", text
    )
    flags = [
        "-std=c++14",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-attributes",
        "-Wno-unknown-pragmas",
        "-Wno-unused",
    ]
    command = clang()
    assert command is not None
    _cached(
        "spaces.o",
        text.encode(),
        [*command, *flags, "-Wno-unused-const-variable", f"-I{TESTS}", "-c", "IN", "-o", "OUT"],
        text,
    )
