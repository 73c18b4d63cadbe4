"""Texts that packages carry: the King James Bible, Austen's novels, WordNet's glosses. Nothing is downloaded here."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

from nybble.demo import bible

AUSTEN_PACKAGE = "r-cran-janeaustenr"  # Debian: usr/lib/R/site-library/janeaustenr/data/Rdata.rdb
WORDNET_PACKAGE = "wordnet-base"  # Debian: usr/share/wordnet/data.noun


def book(name: str) -> str:
    """A book of the King James Bible."""
    return " ".join(bible.chapters(name))


def austen(rdb: Path) -> dict[str, str]:
    """Title -> text of the novels in janeaustenr's lazy-load database, paragraphs in one line each.

    The file is a row of compressed R objects, each a big-endian length and a zlib stream; an object's lines are R's
    CHARSXPs: four bytes of flags, a length, and the characters.
    """
    data, novels, at = rdb.read_bytes(), {}, 0
    while at < len(data):
        stream = zlib.decompressobj()
        content = stream.decompress(data[at + 4 :])
        at = len(data) - len(stream.unused_data)
        start = content.find(b"\x00\x00\x00\x10")  # a vector of strings
        (count,) = struct.unpack(">I", content[start + 4 : start + 8])
        place, lines = start + 8, []
        for _ in range(count):
            (size,) = struct.unpack(">i", content[place + 4 : place + 8])
            lines.append(content[place + 8 : place + 8 + max(size, 0)].decode())
            place += 8 + max(size, 0)
        title = next(line for line in lines if line.strip()).strip().lower()
        paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
        novels[title] = "\n".join(" ".join(p.split()) for p in paragraphs if p.strip())
    return novels


def glosses(data: Path) -> list[str]:
    """The glosses of a WordNet data file, in its order."""
    rows = (line for line in data.read_text(encoding="utf-8").splitlines() if line[:1].isdigit())
    return [row.partition(" | ")[2].strip() for row in rows]
