"""Records out of files, directories and lists, each with the place it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".txt", ".jsonl", ".json")
"""What is read out of a directory."""


class Record(NamedTuple):
    """A text or the fields of one row, and where it stands ("data.jsonl, line 3")."""

    where: str
    value: str | dict[str, Any]


def read_records(data: str | Path | Sequence[Any], name: str = "data") -> Iterator[Record]:
    """The records of a path, or of a list of texts and dicts.

    *.jsonl: one object a line (blank lines are skipped). *.json: a list of objects. Any other file: the whole file is
    one text (UTF-8). A directory: its *.txt, *.jsonl and *.json files in the order of their names.

    Raises:
        FileNotFoundError: no such file, or a directory without a file of these kinds.
        ValueError, TypeError: the content is something else; says where and what is allowed.
    """
    if isinstance(data, str | Path):
        yield from _read_path(Path(data))
        return
    for number, item in enumerate(data):
        where = f"{name}[{number}]"
        if not isinstance(item, str | dict):
            raise TypeError(f"{where} must be a string or a dict, got {type(item).__name__}")
        yield Record(where, item)


def read_documents(path: str | Path) -> list[str]:
    """The texts of a file or directory, as `read_records` reads it; a record must have a string "text"."""
    return [text_of(record) for record in read_records(path)]


def text_of(record: Record) -> str:
    """The record's text. Raises ValueError when it has none."""
    if isinstance(record.value, str):
        return record.value
    text = record.value.get("text")
    if not isinstance(text, str):
        raise ValueError(f'{record.where}: expected an object with a string "text", got {shown(record.value)}')
    return text


def shown(value: Any) -> str:
    """The beginning of a value's JSON, for messages."""
    return json.dumps(value, ensure_ascii=False, default=str)[:80]


def _read_path(path: Path) -> Iterator[Record]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{path}: no .txt, .jsonl or .json file in this directory")
        for file in files:
            yield from _read_path(file)
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (data must be a text, .jsonl or .json file, or a directory)")
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif path.suffix == ".json":
        yield from _read_json(path)
    else:
        yield Record(str(path), _utf8(path.read_bytes(), str(path)))


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({getattr(error, 'msg', 'nested too deeply')})") from error


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if line.strip():
                yield _row(_parse(_utf8(line, where), where), where)


def _read_json(path: Path) -> Iterator[Record]:
    rows = _parse(_utf8(path.read_bytes(), str(path)), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of objects, got {shown(rows)}")
    for number, row in enumerate(rows):
        yield _row(row, f"{path}, item {number}")


def _row(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, got {shown(row)}")
    return Record(where, row)
