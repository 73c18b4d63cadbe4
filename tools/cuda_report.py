"""What the compiler says of the CUDA kernels, on any machine with nvcc: resources, instructions, times, sizes.

Every csrc/cuda/*.cu is compiled for each architecture with the flags of the build and all warnings as errors. Without
a GPU this is what can be known of a kernel's speed: registers and spills, whether loads are 16 bytes wide, whether the
matrix instructions that were meant are there. Needs nothing of nybble, and no package but the standard library.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Werror=all-warnings", "-Xptxas", "-v,-warn-spills")
ARCHES = ("sm_80", "sm_90a")

#: What is counted in the machine code, by a pattern of the opcode with its modifiers.
INSTRUCTIONS = {
    "all": r".",
    "LDG.128": r"LDG\.E.*\.128",
    "LDG": r"LDG\.",
    "LDGSTS.128": r"LDGSTS\.E.*\.128",
    "STG.128": r"STG\.E.*\.128",
    "STG": r"STG\.",
    "LDS": r"LDS",
    "HGMMA": r"HGMMA",
    "HMMA": r"HMMA",
    "IMMA": r"IMMA|IGMMA",
    "local": r"LDL|STL",
}


@dataclass
class Kernel:
    """One entry function in the code of one architecture."""

    name: str
    file: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    instructions: dict[str, int] = field(default_factory=dict)


def compile_one(source: Path, arch: str, folder: Path, nvcc: str) -> dict[str, object]:
    """Compiles for one architecture; the kernels by mangled name, seconds, object file, the compiler's words."""
    target = folder / f"{source.stem}.{arch}.o"
    code = f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}"
    command = [nvcc, *FLAGS, f"-I{ROOT / 'csrc'}", code, "-c", str(source), "-o", str(target)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    return {
        "source": source.name,
        "arch": arch,
        "seconds": time.perf_counter() - start,
        "object": target,
        "failed": done.returncode != 0,
        "said": said,
        "kernels": resources(said, source.name, arch) if done.returncode == 0 else {},
    }


def resources(said: str, file: str, arch: str) -> dict[str, Kernel]:
    """What `ptxas -v` printed, by mangled name of the entry function."""
    kernels: dict[str, Kernel] = {}
    now: Kernel | None = None
    for line in said.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            now = kernels.setdefault(found[1], Kernel(found[1], file, arch))
        if now is None:
            continue
        if found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            now.stack, now.spills = max(now.stack, int(found[1])), now.spills + int(found[2]) + int(found[3])
        if found := re.search(r"Used (\d+) registers", line):
            now.registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            now.shared = int(shared[1]) if shared else 0
            now = None
    return kernels


def demangled(names: list[str]) -> dict[str, str]:
    """Readable names, without namespaces, return type and parameters."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    lines = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {name: short_name(line) for name, line in zip(names, lines.splitlines(), strict=True)}


def short_name(full: str) -> str:
    """`void a::(anonymous namespace)::k<T, (int)4>(X)` as `k<T, 4>`."""
    name = re.sub(
        r"\(anonymous namespace\)::|<unnamed>::|_INTERNAL_\w+::|nybble::(cuda::)?|\((bool|int|long|unsigned int)\)",
        "",
        full,
    )
    name = re.sub(r"^void ", "", name)
    depth = 0
    for index, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:index]
    return name


def find_cuobjdump(given: str | None) -> tuple[str | None, str]:
    """The disassembler and where it is from, or None and what to do."""
    if given:
        return given, given
    if found := shutil.which("cuobjdump"):
        return found, found
    try:
        spec = importlib.util.find_spec("triton")
    except (ImportError, ValueError):
        spec = None
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "backends/nvidia/bin/cuobjdump"
        if path.exists():
            return str(path), f"{path} (of the triton package)"
    return None, "no machine code was read: cuobjdump is neither on PATH nor in an installed triton package"


def count_instructions(binary: Path, cuobjdump: str) -> dict[str, dict[str, int]]:
    """Instruction counts of each function of an object file, by mangled name."""
    text = subprocess.run([cuobjdump, "--dump-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    counts: dict[str, Counter[str]] = {}
    now: Counter[str] = Counter()
    patterns = {name: re.compile(pattern) for name, pattern in INSTRUCTIONS.items()}
    for line in text.splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            now = counts.setdefault(found[1], Counter())
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            now.update(name for name, pattern in patterns.items() if pattern.match(found[1]) and found[1] != "NOP")
    return {name: dict(count) for name, count in counts.items()}


def build_wheel(folder: Path) -> Path:
    """A wheel of this tree with the CUDA kernels."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", "-w", str(folder)]
    options = ["-C", "cmake.define.NYBBLE_CUDA=ON", "-C", f"build-dir={folder / 'build'}"]
    subprocess.run([*pip, *options, str(ROOT)], check=True)
    return next(folder.glob("nybble-*.whl"))


def wheel_sizes(wheel: Path) -> dict[str, int]:
    """Bytes of a wheel with the CUDA kernels and of what it would be without, and of the two shared objects."""
    sizes = {"wheel": wheel.stat().st_size}
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            for module in ("_core", "_cuda"):
                if info.filename.startswith(f"nybble/{module}.") and not info.filename.endswith(".pyi"):
                    sizes[module] = info.file_size
                    sizes[f"{module} in the wheel"] = info.compress_size
    sizes["wheel without CUDA"] = sizes["wheel"] - sizes.get("_cuda in the wheel", 0)
    return sizes


# ---- what is printed -------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[object]]) -> str:
    """Columns aligned; numbers to the right."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(not isinstance(row[i], str) or row[i] == "-" for row in rows) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True))
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def kernel_rows(kernels: list[Kernel], counted: list[str]) -> list[list[object]]:
    return [
        [k.name[:90], k.arch, k.registers, k.shared, k.stack, k.spills, *(k.instructions.get(c, "-") for c in counted)]
        for k in kernels
    ]


def brief_rows(kernels: list[Kernel], arches: list[str], counted: list[str]) -> list[list[object]]:
    """One row for all instances of a template: the most registers, by architecture, everything else the most of all."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(kernel.name.split("<")[0], []).append(kernel)
    rows: list[list[object]] = []
    for name, group in groups.items():
        by_arch = [[k for k in group if k.arch == arch] for arch in arches]
        last = by_arch[-1] or group
        rows.append(
            [
                f"{name} x{max(map(len, by_arch))}",
                " / ".join(str(max((k.registers for k in one), default=0)) for one in by_arch),
                max(k.shared for k in group),
                max(k.stack for k in group),
                max(k.spills for k in group),
                *(max(k.instructions.get(c, 0) for k in last) for c in counted),
            ]
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="by default every csrc/cuda/*.cu")
    parser.add_argument("--arch", default=",".join(ARCHES), help="comma-separated, sm_80 or sm_90a by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--brief", action="store_true", help="one row for all instances of a template")
    parser.add_argument("--wheels", action="store_true", help="build a wheel too and tell sizes (minutes)")
    parser.add_argument("--wheel", type=Path, help="tell the sizes of this one, which is built already")
    parser.add_argument("--cuobjdump", help="the disassembler, if it is neither on PATH nor in a triton package")
    parser.add_argument("--json", type=Path, help="write everything there as well")
    args = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("cuda_report needs nvcc on PATH", file=sys.stderr)
        return 2
    sources = args.files or sorted((ROOT / "csrc/cuda").glob("*.cu"))
    cuobjdump, origin = find_cuobjdump(args.cuobjdump)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            jobs = [
                pool.submit(compile_one, source, arch, folder, nvcc)
                for source in sources
                for arch in args.arch.split(",")
            ]
            results = [job.result() for job in jobs]
        kernels: list[Kernel] = []
        for result in results:
            found: dict[str, Kernel] = result["kernels"]
            counts = count_instructions(result["object"], cuobjdump) if cuobjdump and found else {}
            for mangled, kernel in found.items():
                kernel.instructions = {key: counts.get(mangled, {}).get(key, 0) for key in INSTRUCTIONS if counts}
            kernels += found.values()
        names = demangled([kernel.name for kernel in kernels])
        for kernel in kernels:
            kernel.name = names[kernel.name]
        wheel = build_wheel(folder) if args.wheels and args.wheel is None else args.wheel
        sizes = wheel_sizes(wheel) if wheel is not None else {}
    return report(args, results, kernels, sizes, cuobjdump is not None, origin)


def report(
    args: argparse.Namespace,
    results: list[dict[str, object]],
    kernels: list[Kernel],
    sizes: dict[str, int],
    disassembled: bool,
    origin: str,
) -> int:
    """Prints it all; 1 if something did not compile or spills registers."""
    failed = [result for result in results if result["failed"]]
    for result in failed:
        print(f"{result['source']} for {result['arch']} does not compile:\n{str(result['said']).strip()}\n")
    counted = list(INSTRUCTIONS) if disassembled else []
    arches = args.arch.split(",")
    if args.brief:
        header = ["kernel", f"regs {' / '.join(arches)}", "smem", "stack", "spills", *counted]
        print(table(header, brief_rows(kernels, arches, counted)))
    else:
        print(table(["kernel", "arch", "regs", "smem", "stack", "spills", *counted], kernel_rows(kernels, counted)))
    print("smem: static bytes (the rest is asked for at launch); spills: bytes stored and loaded; instructions:")
    print(f"{arches[-1] if args.brief else 'each'}, by {origin}" if disassembled else origin)
    times: dict[str, dict[str, float]] = {}
    for result in results:
        times.setdefault(result["source"], {})[result["arch"]] = result["seconds"]
    all_of = [round(sum(t.get(arch, 0.0) for t in times.values()), 1) for arch in arches]
    if args.brief:
        slowest = max(times, key=lambda source: sum(times[source].values()), default="-")
        print(f"seconds to compile, one after the other: {all_of} for {arches}; the slowest file: {slowest}")
    else:
        rows = [[source, *(round(seconds.get(arch, 0.0), 1) for arch in arches)] for source, seconds in times.items()]
        print("\n" + table(["seconds to compile", *arches], [*rows, ["all", *all_of]]))
    for what, size in sizes.items():
        print(f"{what}: {size:,} bytes")
    spilled = [k for k in kernels if k.spills or k.stack]
    outcome = f"{len(kernels)} kernels, {len(failed)} files failed, {len(spilled)} kernels with a stack frame or spills"
    print(f"\n{outcome}" + (": " + ", ".join(f"{k.name} ({k.arch})" for k in spilled)[:600] if spilled else ""))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"kernels": [asdict(k) for k in kernels], "seconds": times, "sizes": sizes}
        args.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 1 if failed or any(k.spills for k in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
