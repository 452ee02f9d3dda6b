"""Text files (csv, tsv, json, jsonl, txt) → Arrow files, once, with line numbers, naming what cannot be read.

Cells of csv and tsv files stay the text that they are: "NA" is a text and "007" keeps its zeros.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data.errors import UserError

LINE = "__line__"
"""The column that holds the line (or, in a json list, the item) that a row stands on, from 1."""

CHUNK = 10_000  # rows converted at once: some 10 MB of text
VERSION = 1  # part of the cache key: raise it when what is written changes

Numbered = Iterator[tuple[int, "dict[str, Any] | str"]]  # (line, row), or (line, what is wrong with it)


def convert(file: Path, cache: Path, *, skip_bad: bool) -> tuple[Path, tuple[str, ...]]:
    """Return the Arrow file that holds `file`'s rows, and a line for each row left out as unusable.

    Written once for each content (name, size, time) of the file, whole or not at all; processes that call this
    together wait for the first. Raises `UserError` for the first unusable row unless `skip_bad`.
    """
    from filelock import FileLock

    state = file.stat()
    key = repr((VERSION, str(file.resolve()), state.st_size, state.st_mtime_ns, skip_bad))
    target = cache / "text" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.arrow"
    notes = target.with_suffix(".skipped.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            skipped = _write(file, target.with_suffix(".writing"), skip_bad=skip_bad)
            notes.write_text(json.dumps(skipped), encoding="utf-8")
            os.replace(target.with_suffix(".writing"), target)
    return target, tuple(json.loads(notes.read_text(encoding="utf-8")))


def _write(file: Path, target: Path, *, skip_bad: bool) -> list[str]:
    import pyarrow as pa

    skipped: list[str] = []
    schema = pa.schema([])
    try:
        for chunk in _chunks(file, skipped, skip_bad=skip_bad):  # the first pass finds the types of all rows
            schema = pa.unify_schemas([schema, _table(chunk).schema], promote_options="permissive")
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for chunk in _chunks(file, [], skip_bad=True):
                writer.write_table(_table(chunk, schema))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{file}: rows disagree about a column's type: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    return skipped


def _table(rows: list[dict[str, Any]], schema: Any = None) -> Any:
    import pyarrow as pa

    if schema is not None:
        return pa.Table.from_pylist(rows, schema=schema)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def _chunks(file: Path, skipped: list[str], *, skip_bad: bool) -> Iterator[list[dict[str, Any]]]:
    rows = _good_rows(file, skipped, skip_bad=skip_bad)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _good_rows(file: Path, skipped: list[str], *, skip_bad: bool) -> Iterator[dict[str, Any]]:
    kinds: dict[str, str] = {}
    for line, row in READERS[file.suffix.lower()](file):
        problem = row if isinstance(row, str) else _conflict(row, kinds)
        if problem is None:
            assert isinstance(row, dict)
            yield {**row, LINE: line}
        elif skip_bad:
            skipped.append(f"{file.name}, line {line}: {problem}")
        else:
            raise UserError(f"{file}, line {line}: {problem}. Mend it, or set data.on_bad_row=skip")


def _conflict(row: dict[str, Any], kinds: dict[str, str]) -> str | None:
    """Say which key of `row` holds another kind of value than the rows before it; remember kinds seen first."""
    for key, value in row.items():
        kind = _kind(value)
        if kind and kinds.setdefault(key, kind) != kind:
            return f"{key!r} holds {kind} ({str(value)[:40]!r}) where earlier rows hold {kinds[key]}"
    return None


def _kind(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true or false"
    return {int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}[type(value)]


def _delimited(delimiter: str) -> Callable[[Path], Numbered]:
    def read(file: Path) -> Numbered:
        csv.field_size_limit(2**31 - 1)
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header) or not all(header):
                raise UserError(f"{file}, line 1: the header needs a different name for each column, not {header}")
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield reader.line_num, f"not a readable row ({error})"
                    continue
                if len(cells) == len(header):
                    yield reader.line_num, dict(zip(header, cells, strict=True))
                elif cells:
                    yield reader.line_num, f"{len(cells)} cells where the header names {len(header)} columns"

    return read


def _json_lines(file: Path) -> Numbered:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield number, _parse(line)


def _parse(text: str) -> dict[str, Any] | str:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        return f"malformed JSON ({error.msg} at column {error.colno})"
    return row if isinstance(row, dict) else f"a row must be a JSON object, not {text.strip()[:40]!r}"


def _json(file: Path) -> Numbered:
    """A JSON list of objects, or {"data": [...]}, or one object a line."""
    with file.open(encoding="utf-8-sig") as stream:
        text = stream.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several objects, one a line
            yield from _json_lines(file)
        else:
            yield error.lineno, f"malformed JSON ({error.msg} at column {error.colno})"
        return
    rows = content["data"] if isinstance(content, dict) and isinstance(content.get("data"), list) else content
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield number, row if isinstance(row, dict) else f"a row must be a JSON object, not {str(row)[:40]!r}"


def _lines(file: Path) -> Numbered:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield number, {"text": line.rstrip("\r\n")}


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".txt": _lines,
}
