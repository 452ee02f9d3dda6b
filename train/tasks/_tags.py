"""Which scheme the tags of a column are of, and what is refused instead of being taken for plain tags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data.errors import UserError
from data.source import Rows, named
from train.schemes import ALL_LETTERS, LETTERS, Scheme, detect, fits
from train.tasks import _labels

LOOKED_AT = 10_000  # rows of a file that tell whether entities begin with B or with I
CHUNK = 1_000  # rows read at once


def refuse_plain_text(rows: Sequence[Rows]) -> None:
    """Raise `UserError` for a .txt file: its lines are texts, also where they are those of a CoNLL file."""
    for part in rows:
        if Path(part.name).suffix == ".txt":
            raise UserError(
                f"{part.name}: of a .txt file each line is a text. Give a CoNLL file (a word and its tag a line) the "
                "ending .conll, .iob, .iob2 or .bio, one of CoNLL-U .conllu"
            )


def scheme_of(asked: str, rows: Sequence[Rows], column: str, labels: _labels.Labels) -> Scheme | None:
    """Return the scheme that is asked for, or with "auto" the one that tags and rows show; None where there is none.

    Raises `UserError` for tags that are not of the scheme, and with "auto" for those of which most spell entities and
    some do not: one stray tag must not switch the figures of entities off in silence.
    """
    names = labels.names
    if "-100" in names:
        raise UserError(
            f"the column {column!r} holds -100, the mark of pieces without a tag in rows prepared for another "
            "program. Give the words as they are, with a tag for each"
        )
    if asked == "none":
        return None
    if asked != "auto":
        scheme = next(scheme for scheme in LETTERS if scheme == asked)
        if not fits(names, LETTERS[scheme]):
            begins = ", ".join(f"{letter}-" for letter in LETTERS[scheme])
            raise UserError(
                f"task.scheme: {asked} has O and tags that begin with {begins}; the column {column!r} has "
                f"{', '.join(names[:20])}"
            )
        return scheme
    found = detect(names, _sentences(rows, column, labels))
    spelt = [name for name in names if name[0:1].upper() in [*ALL_LETTERS] and name[1:2] == "-" and name[2:]]
    others = [name for name in names if name != "O" and name not in spelt]
    if found is None and len(spelt) > len(others):
        stray = "in lower case" if spelt[0][0].islower() else "with the letters of several schemes"
        stray = f"but not {', '.join(map(repr, others[:10]))}" if others else stray
        raise UserError(
            f"the column {column!r}: tags such as {', '.join(spelt[:3])} spell entities, {stray}. Mend the tags "
            f"(schemes: {', '.join(LETTERS)}), or set task.scheme: none to learn all of them as plain tags"
        )
    return found


def _sentences(rows: Sequence[Rows], column: str, labels: _labels.Labels) -> Iterator[list[str]]:
    """Yield the tags of the first rows of each file; what is wrong with rows is not told here."""
    for part in rows:
        dataset = part.dataset.select_columns([column])
        for start in range(0, min(len(dataset), LOOKED_AT), CHUNK):
            for tags in named(dataset[start : start + CHUNK], dataset.features)[column]:
                numbers = [labels.index(tag) for tag in tags or () if isinstance(tags, list)]
                yield [labels.names[number] for number in numbers if number is not None]
