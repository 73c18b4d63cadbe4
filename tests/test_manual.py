"""The manual knows every public name and every command."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

import nybble
from nybble.cli.app import build

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_reference_lists_every_public_name() -> None:
    listed = set(re.findall(r"auto(?:class|function):: (\w+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8")))
    assert set(nybble.__all__) <= listed


def test_the_manual_shows_every_command() -> None:
    shown = set(re.findall(r"nybble (\w+)", "".join(page.read_text(encoding="utf-8") for page in PAGES)))
    assert {command.name for command in build().registered_commands} <= shown


def command_lines(text: str) -> list[str]:
    """What a page shows as commands: lines of sh blocks, comments left out, and `nybble ...` within sentences."""
    lines = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        lines += [line.partition("  #")[0] for line in block.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`(nybble [^`]*)`", text)


def test_commands_and_options_that_the_manual_shows_exist() -> None:
    commands = get_command(build()).commands
    known = {
        name: {flag for p in one.params for flag in (*p.opts, *p.secondary_opts)} for name, one in commands.items()
    }
    seen = 0
    for page in PAGES:
        for line in command_lines(page.read_text(encoding="utf-8")):
            for name, rest in re.findall(r"(?<![\w/.-])nybble ([a-z]+)([^|;&]*)", line):
                assert name in known, f"{page.name}: {line}"
                flags = set(re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", rest))
                assert flags <= {*known[name], "--help"}, f"{page.name}: {line}: {flags - known[name]}"
                seen += len(flags)
    assert seen > 30


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^[a-z-]+$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} == {*listed, "index"}


def test_every_plot_of_the_gallery_is_shown_and_none_is_missing() -> None:
    shown = re.findall(r"\(gallery/([\w.-]+\.svg)", "".join(page.read_text(encoding="utf-8") for page in PAGES))
    assert set(shown) == {plot.name for plot in (ROOT / "docs" / "gallery").glob("*.svg")}


def test_links_and_images_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
