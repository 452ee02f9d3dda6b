"""Text files (csv, tsv, json, jsonl, txt, CoNLL) → Arrow files, once, with the place of each row, naming bad rows.

Cells of csv and tsv files stay the text that they are: "NA" is a text and "007" keeps its zeros.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data import conll, pulse, squad
from data.cache import kept
from data.errors import UserError
from data.tables import grouped

LINE = "__line__"
"""The column that tells where a row stands: "line 12" or, in a json list, "item 12", from 1; SQuAD has its own."""

CHUNK = 10_000  # rows converted at once: some 10 MB of text
VERSION = 3  # part of the cache key: raise it when what is written changes

Row = dict[str, Any]
Placed = Iterator[tuple[str, "Row | str"]]  # (place, row), or (place, what is wrong with it)

QUOTED = re.compile(r'"(?:[^"]|"")*"', re.DOTALL)


def convert(file: Path, cache: Path, *, skip_bad: bool) -> tuple[Path, tuple[str, ...]]:
    """Return the Arrow file that holds `file`'s rows, and a line for each row left out as unusable.

    Written once for each content (name, size, time) of the file, whole or not at all; processes that call this
    together wait for the first. Raises `UserError` for the first unusable row unless `skip_bad`.
    """
    state = file.stat()
    key = repr((VERSION, str(file.resolve()), state.st_size, state.st_mtime_ns, skip_bad))
    target = cache / "text" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.arrow"
    notes = kept(target, lambda writing: {"skipped": _write(file, writing, skip_bad=skip_bad)})
    return target, tuple(notes["skipped"])


def _write(file: Path, target: Path, *, skip_bad: bool) -> list[str]:
    import pyarrow as pa

    skipped: list[str] = []
    schema = pa.schema([])
    try:
        for chunk in _chunks(file, skipped, skip_bad=skip_bad):  # the first pass finds the types of all rows
            schema = pa.unify_schemas([schema, table_of(chunk).schema], promote_options="permissive")
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for table in grouped(table_of(chunk, schema) for chunk in _chunks(file, [], skip_bad=True)):
                writer.write_table(table)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{file}: rows disagree about a column's type: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({_undecodable(file)}): save it as UTF-8") from error
    return skipped


def table_of(rows: list[Row], schema: Any = None) -> Any:
    """Return rows as an Arrow table, of the types that they are of themselves unless a schema is given."""
    import pyarrow as pa

    if schema is not None:
        return pa.Table.from_pylist(rows, schema=schema)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def _chunks(file: Path, skipped: list[str], *, skip_bad: bool) -> Iterator[list[Row]]:
    rows = _good_rows(file, skipped, skip_bad=skip_bad)
    while chunk := list(islice(rows, CHUNK)):
        pulse.beat()
        yield chunk


def _good_rows(file: Path, skipped: list[str], *, skip_bad: bool) -> Iterator[Row]:
    kinds: dict[str, str] = {}
    for place, row in READERS[file.suffix.lower()](file):
        problem = row if isinstance(row, str) else _first(misfit(name, value, kinds) for name, value in row.items())
        if problem is None:
            assert isinstance(row, dict)
            yield {**row, LINE: place}
        elif skip_bad:
            skipped.append(f"{file.name}, {place}: {problem}")
        else:
            raise UserError(f"{file}, {place}: {problem}. Mend it, or set data.on_bad_row=skip")


def misfit(name: str, value: Any, kinds: dict[str, str]) -> str | None:
    """Say why a value cannot stand in its column: mostly because it is of another kind than those before it.

    `kinds` remembers the kind seen first, also of what lists and mappings hold ("labels[]", "answer.text").
    """
    kind = _kind(value)
    if kind and kinds.setdefault(name, kind) != kind:
        return f"{name!r} holds {kind} ({str(value)[:40]!r}) where earlier rows hold {kinds[name]}"
    if isinstance(value, str) and not _encodable(value):
        return f"{name!r} holds half a character (a lone surrogate)"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"{name!r} holds a number of more than 64 bits"
    if isinstance(value, list):
        return _first(misfit(f"{name}[]", element, kinds) for element in value)
    if isinstance(value, dict):
        return _first(misfit(f"{name}.{key}", element, kinds) for key, element in value.items())
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first(problems: Iterator[str | None]) -> str | None:
    return next((problem for problem in problems if problem), None)


def _kind(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true or false"
    return {int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}[type(value)]


def _comma_separated(file: Path) -> Placed:
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = _header(file, next(reader, []))
        except csv.Error as error:
            raise UserError(f"{file}, line 1: not a readable header ({error})") from error
        while True:
            first = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield _lines(first, reader.line_num), f"not a readable row ({error}): a quote is out of place"
                continue
            if cells is None:
                return
            if cells:
                yield _lines(first, first), _row(header, cells)


def _tab_separated(file: Path) -> Placed:
    """A row is a line, and quotes are characters like any other: GLUE's files begin cells with stray ones.

    Only what a csv writer has put in quotes is taken out of them again: cells with doubled quotes inside, and all
    cells under a header in quotes.
    """
    with file.open(encoding="utf-8-sig", newline="\n") as stream:
        titles = stream.readline().rstrip("\r\n").split("\t")
        quoted = all(QUOTED.fullmatch(title) for title in titles)
        header = _header(file, [_unquoted(title, quoted) for title in titles] if titles != [""] else [])
        for number, line in enumerate(stream, 2):
            text = line.rstrip("\r\n")
            if text:
                row = _row(header, [_unquoted(cell, quoted) for cell in text.split("\t")])
                if isinstance(row, str) and '"' in text:
                    row += " (a tsv row is one line: quotes cannot hold tabs or line breaks)"
                yield _lines(number, number), row


def _unquoted(cell: str, always: bool) -> str:
    if cell[:1] == '"' and (always or '""' in cell[1:-1]) and QUOTED.fullmatch(cell):
        return cell[1:-1].replace('""', '"')
    return cell


def _header(file: Path, titles: list[str]) -> list[str]:
    """Return the column names; a column without one (where pandas writes its index) is named by its number."""
    header = [title or f"column {number}" for number, title in enumerate(titles, 1)]
    if len(set(header)) < len(header):
        raise UserError(f"{file}, line 1: the header needs a different name for each column, not {', '.join(header)}")
    return header


def _row(header: Sequence[str], cells: Sequence[str]) -> Row | str:
    if len(cells) != len(header):
        return f"{len(cells)} cells where the header names {len(header)} columns"
    if any("\0" in cell for cell in cells):
        return "holds a NUL character: is the file really UTF-8 text?"
    return dict(zip(header, cells, strict=True))


def _lines(first: int, last: int) -> str:
    return f"line {first}" if first >= last else f"lines {first} to {last}"


def _json_lines(file: Path) -> Placed:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield _lines(number, number), _parse(line.rstrip("\r\n"))


def _parse(text: str) -> Row | str:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        return f"malformed JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        return f"unusable JSON ({error})"
    return row if isinstance(row, dict) else f"a row must be a JSON object, not {text.strip()[:40]!r}"


def _json(file: Path) -> Placed:
    """A JSON list of objects, or {"data": [...]}, or SQuAD's articles, or one object a line. O(file) memory."""
    text = file.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":  # several objects, one a line
            yield from _json_lines(file)
        else:
            yield _lines(error.lineno, error.lineno), f"malformed JSON ({error.msg} at column {error.colno})"
        return
    except (ValueError, RecursionError) as error:  # as in _parse
        raise UserError(f"{file}: unusable JSON ({error})") from error
    if squad.recognised(content):
        yield from squad.flat(content)
        return
    rows = content["data"] if isinstance(content, dict) and isinstance(content.get("data"), list) else content
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield f"item {number}", row if isinstance(row, dict) else f"a row must be a JSON object, not {str(row)[:40]!r}"


def _texts(file: Path) -> Placed:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield _lines(number, number), _row(["text"], [line.rstrip("\r\n")])


def _undecodable(file: Path) -> str:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {error.start + 1}"
    raise AssertionError(file)


READERS: dict[str, Callable[[Path], Placed]] = {
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".txt": _texts,
    ".conll": conll.words_and_tags,
    ".iob": conll.words_and_tags,
    ".iob2": conll.words_and_tags,
    ".bio": conll.words_and_tags,
    ".conllu": conll.universal,
}
