"""tools/metal_lint.py: each rule finds what it is for, and the text that ships has none of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))
lint: Any = importlib.import_module("metal_lint")
COMMON = (lint.FOLDER / "decode.metal").read_text(encoding="ascii")
SHIPPED = sorted(lint.FOLDER.glob("*.metal"))

#: (what is planted as a line of its own, a word of what is said about it)
PLANTED = (
    ("constant float kMicro = 1.0f;  // \u00b5", "ASCII"),
    ("kernel void f(threadgroup float* shared [[threadgroup(0)]]) {}", "body"),
    ("constant int kBlock [[function_constant(0)]];", "function constants"),
    ('#include "decode.metal"', "include"),
    ("#include <cmath>", "include"),
    ("struct S { float a; float get() const { return a; } };", "member"),
    ("struct S { float a; S operator+(S b); };", "member"),
    ("inline void f(float* x) {}", "address space"),
    ("inline void f(const uchar* x) {}", "address space"),
    ("inline void f(float4& x) {}", "address space"),
    ("inline void f(Scales& x) {}", "address space"),
    ("template <typename U> inline void f(const U* x) {}", "address space"),
    ("inline float f(device const uchar* x) { return *(const float*)x; }", "address space"),
    ("inline void f(vec<float, 4>* x) {}", "address space"),
    ("inline void f(float x) { bfloat y = x; }", "bfloat"),
    ("inline bfloat f(float x) { return x; }", "bfloat"),
)


@pytest.mark.parametrize("line, word", PLANTED)
def test_a_planted_line_is_found_where_it_is(line: str, word: str) -> None:
    found = lint.findings(f"{COMMON}\n{line}\n")
    assert [(at, word in what) for at, what in found] == [(COMMON.count("\n") + 2, True)]


@pytest.mark.parametrize(
    "line",
    [
        "inline void f(device const float* x, thread uint* y, constant Scales& z) {}",
        "inline float f(float a, float b) { const float c = a * b; return c * 2.0f; }",
        "inline bfloat f(float x) { bfloat y = bfloat(x); return bfloat(x); }",
        "// a pointer float* in a comment, [[threadgroup(0)]] too",
        "threadgroup float* tile = (threadgroup float*)memory;",
        "struct S { device const float* x; long rows; };",
    ],
)
def test_what_every_compiler_takes_is_not_found(line: str) -> None:
    assert lint.findings(line, COMMON) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_text_that_ships_is_clean(path: Path) -> None:
    assert lint.findings(path.read_text(encoding="utf-8"), COMMON) == []


def test_the_command_says_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(SHIPPED) >= 5 and lint.main([]) == 0
    wrong = tmp_path / "wrong.metal"
    wrong.write_text("inline void f() {}\ninline void g(float* x) {}\n")
    assert lint.main([str(wrong)]) == 1
    assert capsys.readouterr().out == f"{wrong}:2: a pointer or reference needs an address space\n"
