"""What some compiler of macOS 14 to 27 would refuse in csrc/metal: `python tools/metal_lint.py [FILE...]`.

No Metal compiler runs in the ordinary test suite, so the rules are read off the text: comments and strings are blanked,
then each rule is a pattern. A conversion to bfloat whose target is an element of an array is beyond a pattern; the shim
of tests/shim/metal has a bfloat type that refuses it. Exit status 1, and a line for each finding, if there are any.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "csrc" / "metal"

_BLANKED = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ATTRIBUTE = re.compile(r"\[\[.*?\]\]", re.DOTALL)
_SPACES = ("device", "threadgroup", "constant", "thread")
_SCALARS = "bool|u?char|u?short|u?int|u?long|half|float|bfloat|size_t|auto|void|atomic_u?int|packed_\\w+"
_CAST = re.compile(r"\s*(?:bfloat|T|as_type<bfloat>|rounded)\s*\(|\s*\(bfloat\)")


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _structs(text: str) -> Iterator[tuple[int, str]]:
    """(where it begins, its members) of each struct, class or union."""
    for match in re.finditer(r"\b(?:struct|class|union)\s+\w+[^;{()]*\{", text):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield match.end(), text[match.end() : end - 1]


def _types(text: str) -> str:
    """A pattern for the name of a type: MSL's own, those that the text defines, and the parameters of its templates."""
    defined = re.findall(r"\b(?:struct|class|union|typename)\s+(\w+)", text)
    names = "|".join([_SCALARS, *sorted(set(defined)), r"(?:u?char|u?short|u?int|u?long|half|float|bfloat)[234]"])
    return rf"(?:vec\s*<[^<>]*>|simdgroup_matrix\s*<[^<>]*>|(?:{names})\b)"


def _pointers(text: str, types: str) -> Iterator[tuple[int, str]]:
    """Pointers and references whose declaration names no address space."""
    pattern = rf"((?:\b(?:{'|'.join(_SPACES)}|const|volatile)\s+)*)(?<![\w.]){types}\s*(?:const\s*)?([*&])(?!&)"
    for match in re.finditer(pattern, text):
        if not set(match[1].split()) & set(_SPACES):
            yield match.start(), "a pointer or reference needs an address space"


def _bfloats(text: str) -> Iterator[tuple[int, str]]:
    """bfloat variables and results that are not written as a conversion."""
    for match in re.finditer(r"\bbfloat\s+\w+\s*(=|\{)", text):
        if not _CAST.match(text, match.end()):
            yield match.start(), "a value becomes a bfloat only by bfloat(...)"
    for match in re.finditer(r"\bbfloat\s+\w+\s*\([^;{}]*\)\s*\{([^{}]*)\}", text):
        for result in re.finditer(r"\breturn\b", match[1]):
            if not _CAST.match(match[1], result.end()):
                yield match.start(1) + result.start(), "a value becomes a bfloat only by bfloat(...)"


def findings(text: str, types_of: str = "") -> list[tuple[int, str]]:
    """(line, what is wrong) of one file's text; `types_of`: other text that defines types for it."""
    found = [(m.start(), "not ASCII") for m in re.finditer(r"[^\x00-\x7f]+", text)]
    text = _BLANKED.sub(_blank, text)
    for pattern, what in (
        (r"\[\[\s*threadgroup\s*\(", "threadgroup memory is declared in a kernel's body, not passed as an argument"),
        (r"\bfunction_constant\b", "function constants: write a template with host_name"),
        (r"#\s*include(?!\s*<metal_\w+>)", "compile_shader takes one text: only <metal_...> can be included"),
    ):
        found += [(m.start(), what) for m in re.finditer(pattern, text)]
    plain = _ATTRIBUTE.sub(_blank, text)
    for start, members in _structs(plain):
        bodies = re.finditer(r"\boperator\b|\b\w+\s*\(", members)
        found += [(start + m.start(), "member functions: write a free function") for m in bodies]
    types = _types(plain + _ATTRIBUTE.sub(" ", _BLANKED.sub(" ", types_of)))
    found += _pointers(plain, types)
    found += _bfloats(plain)
    return sorted({(text.count("\n", 0, at) + 1, what) for at, what in found})


def main(arguments: list[str]) -> int:
    """Prints FILE:LINE: WHAT for each finding."""
    files = [Path(a) for a in arguments] or sorted(FOLDER.glob("*.metal"))
    common = (FOLDER / "decode.metal").read_text(encoding="utf-8")
    wrong = [(f, *found) for f in files for found in findings(f.read_text(encoding="utf-8"), common)]
    for file, line, what in wrong:
        print(f"{file}:{line}: {what}")
    return 1 if wrong or not files else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
