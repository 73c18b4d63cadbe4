"""The manual knows every public name and every command."""

from __future__ import annotations

import re
from pathlib import Path

import nybble
from nybble.cli.app import build

ROOT = Path(__file__).resolve().parents[1]


def test_the_reference_lists_every_public_name() -> None:
    listed = set(re.findall(r"auto(?:class|function):: (\w+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8")))
    assert set(nybble.__all__) <= listed


def test_the_manual_shows_every_command() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    shown = set(re.findall(r"nybble (\w+)", "".join(page.read_text(encoding="utf-8") for page in pages)))
    assert {command.name for command in build().registered_commands} <= shown


def test_links_and_images_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
