"""Calibration and Rounding: which settings there are, what is refused, and the command line's part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nybble import Calibration, Rounding, _core
from nybble.calibration.config import identity
from nybble.cli.app import build
from nybble.errors import CalibrationError

pytest.importorskip("transformers")

WINDOWS = torch.arange(12).view(3, 4)


@pytest.mark.parametrize(
    "setting", [{"damping": True}, {"act_order": "no"}, {"act_order": 1}, {"sweeps": True}, {"refits": 1.0}]
)
def test_settings_of_other_types_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is "):
        Rounding(**setting)


def test_a_calibration_is_equal_to_itself_alone() -> None:
    a, b = Calibration(WINDOWS), Calibration(WINDOWS)
    assert a == a and a != b and len({a, b}) == 2
    assert replace(a, samples=2).data is WINDOWS


@pytest.mark.parametrize(
    "data",
    [
        [], (), "", b"text", 7, np.int64(7), None, (t for t in ["text"]), {"text"}, ["text", 7], [1, 2.0], [True],
        [[1, 2]], np.zeros(4), np.array(7), np.array(["text"]), np.zeros((2, 1), np.int64), np.array([True]),
        torch.zeros(4), torch.tensor([]), torch.tensor([True]), torch.tensor(7), torch.zeros(0, 4, dtype=torch.int64),
        torch.zeros(2, 1, dtype=torch.int64), torch.zeros(1, 2, 3, dtype=torch.int64),
    ],
    ids=lambda data: f"{type(data).__name__} {data}"[:40],
)  # fmt: skip
def test_data_that_is_no_text_is_told_what_it_may_be(data: Any) -> None:
    with pytest.raises((CalibrationError, TypeError), match="it must be a path of text, a list of texts, token ids"):
        Calibration(data)


@pytest.mark.parametrize(
    "data",
    [
        list(range(12)), range(12), list(np.arange(12)), np.arange(12), np.arange(12, dtype=np.uint16),
        np.arange(12, dtype=">i4"), torch.arange(12, dtype=torch.uint8),
    ],
    ids=lambda data: type(data).__name__,
)  # fmt: skip
def test_token_ids_of_any_kind_of_integers(data: Any, tmp_path: Path) -> None:
    found = Calibration(data, samples=3, seq=4).windows(tmp_path)
    assert found.dtype == torch.int64 and torch.equal(found, WINDOWS)


def test_windows_as_an_array_are_taken_as_they_are(tmp_path: Path) -> None:
    calibration = Calibration(WINDOWS.numpy().astype(np.int32), samples=2, seq=100)
    assert torch.equal(calibration.windows(tmp_path), WINDOWS)


def test_identity_holds_all_that_decides_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity(WINDOWS, Rounding())
    assert first["isa"] == _core.active_isa() and first["torch"] == torch.__version__
    for name in _core.isas():
        previous = _core.set_active_isa(name)
        try:
            assert (identity(WINDOWS, Rounding()) == first) == (name == previous)
        finally:
            _core.set_active_isa(previous)
    monkeypatch.setattr("transformers.__version__", "4.0")
    assert identity(WINDOWS, Rounding()) == {**first, "transformers": "4.0"}


OPTIONS = ["--samples 4", "--seq 64", "--damping 0.5", "--sweeps 0", "--refits 1", "--act-order", "--no-act-order"]


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_calibration_are_refused_without_it(option: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(build(), f"quantize {tmp_path} {tmp_path / 'q'} {option}")
    named = option.partition(" ")[0].replace("--no-", "--")
    assert isinstance(done.exception, ValueError)
    assert str(done.exception).startswith(f"{named}: without --calibrate")


@pytest.mark.parametrize(
    ("options", "samples", "rounding"),
    [
        ("", Calibration("t").samples, Rounding()),
        ("--samples 4 --sweeps 0 --no-act-order", 4, Rounding(sweeps=0, act_order=False)),
    ],
)
def test_options_and_defaults_reach_the_calibration(
    options: str, samples: int, rounding: Rounding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Calibration] = []

    def quantize(*arguments: Any, calibration: Calibration, **others: Any) -> None:
        seen.append(calibration)
        raise KeyboardInterrupt

    monkeypatch.setattr("nybble.checkpoint.stream.quantize", quantize)
    CliRunner().invoke(build(), f"quantize {tmp_path} {tmp_path / 'q'} --calibrate t.txt {options}")
    assert [(item.samples, item.seq, item.rounding) for item in seen] == [(samples, Calibration("t").seq, rounding)]


def test_help_shows_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("COLUMNS", "300"), ("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
    lines = CliRunner().invoke(build(), "quantize --help").output.splitlines()
    defaults = {**vars(Rounding()), "samples": Calibration("t").samples, "seq": Calibration("t").seq}
    defaults |= {
        "act_order": "act-order" if defaults["act_order"] else "no-act-order",
        "workers": "the cores, divided by processes",
    }
    for name, value in defaults.items():
        line = next(line for line in lines if f"--{name.replace('_', '-')} " in line)
        assert f"[default: {value}]" in line
    assert any("--search" in line and "found by calibration" in line for line in lines)
