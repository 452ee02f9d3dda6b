"""CoNLL files: a word a line with its columns, a blank line after each sentence → one row a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

Placed = Iterator[tuple[str, "dict[str, Any] | str"]]  # (place, row), or (place, what is wrong with it)
Lines = list[tuple[int, str]]  # each with its number, from 1

UNIVERSAL = ("tokens", "lemmas", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
"""The columns of CoNLL-U, after the one that numbers the words."""

COMMENT = re.compile(r"#\s*(?:(?:id|sent_id|newdoc|newpar)\b|[\w.]+ = )")
BLANKS = re.compile(" +")
NO_WORD = re.compile(r"\d+-\d+|\d+\.\d+")  # a token of several words, an empty node


def words_and_tags(file: Path) -> Placed:
    """Yield each sentence of a file like CoNLL-2003's, or the first line of it that cannot be read.

    The first column is `tokens`, the last one `tags`, those between are named by number: "column 2". Cells stand apart
    by tabs or, in a line without any, by blanks. All lines have as many as the first. Lines before a sentence that
    begin with # and have not as many, or say `# id`, `# newdoc`, `# key = value` and the like, are comments.
    """
    width = 0
    for lines in _sentences(file):
        words = [line.split("\t") if "\t" in line else BLANKS.split(line.strip(" ")) for _, line in lines]
        width = width or next((len(cells) for cells in words if len(cells) > 1 and not cells[0].startswith("#")), 0)
        comments = (_is_comment(line, cells, width) for (_, line), cells in zip(lines, words, strict=True))
        first = len([*takewhile(bool, comments)])
        lines, words = lines[first:], words[first:]
        if not words:
            continue
        problems = (_misfit(cells, width) for cells in words)
        bad = next(((number, problem) for (number, _), problem in zip(lines, problems, strict=True) if problem), None)
        if bad:
            yield f"line {bad[0]}", bad[1]
            continue
        names = ["tokens", *(f"column {number}" for number in range(2, width)), "tags"]
        yield _place(lines), _row(names, words)


def _is_comment(line: str, cells: Sequence[str], width: int) -> bool:
    return line.startswith("#") and (len(cells) != width or COMMENT.match(line) is not None)


def _misfit(cells: Sequence[str], width: int) -> str | None:
    if len(cells) < 2:
        return f"{cells[0][:40]!r} stands alone, where a word and its tag are wanted with a tab or blanks between them"
    if len(cells) != width:
        return f"{len(cells)} cells where the first line has {width}"
    return _unreadable(cells)


def universal(file: Path) -> Placed:
    """Yield each sentence of a CoNLL-U file, or the first line of it that cannot be read.

    Its words are those numbered 1, 2, 3 with the columns UNIVERSAL; tokens of several words (1-2), empty nodes (1.1)
    and comments are left out. https://universaldependencies.org/format.html
    """
    for lines in _sentences(file):
        words: list[list[str]] = []
        for number, line in lines:
            cells = line.split("\t")
            problem = None if line.startswith("#") else _misnumbered(cells, len(words) + 1)
            if problem:
                yield f"line {number}", problem
                break
            if not line.startswith("#") and not NO_WORD.fullmatch(cells[0]):
                words.append(cells[1:])
        else:
            if words:
                yield _place(lines), _row(UNIVERSAL, words)


def _misnumbered(cells: Sequence[str], number: int) -> str | None:
    if len(cells) != len(UNIVERSAL) + 1:
        return f"{len(cells)} cells where CoNLL-U has {len(UNIVERSAL) + 1}, with tabs between them"
    if cells[0] != str(number) and not NO_WORD.fullmatch(cells[0]):
        return f"the number of the word is {cells[0][:40]!r}, not {number}"
    return _unreadable(cells)


def _unreadable(cells: Sequence[str]) -> str | None:
    if any("\0" in cell for cell in cells):
        return "holds a NUL character: is the file really UTF-8 text?"
    empty = [place for place, cell in enumerate(cells, 1) if not cell]
    return f"cell {empty[0]} is empty" if empty else None


def _sentences(file: Path) -> Iterator[Lines]:
    """Yield the lines between blank lines, those that say -DOCSTART-, and the ends of the file."""
    lines: Lines = []
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.isspace() and not line.startswith("-DOCSTART-"):
                lines.append((number, line.rstrip("\n")))
            elif lines:
                yield lines
                lines = []
    if lines:
        yield lines


def _place(lines: Lines) -> str:
    first, last = lines[0][0], lines[-1][0]
    return f"line {first}" if first == last else f"lines {first} to {last}"


def _row(names: Sequence[str], words: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {name: list(column) for name, column in zip(names, zip(*words, strict=True), strict=True)}
