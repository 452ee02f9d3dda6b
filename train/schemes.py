"""How tags of words spell entities: IOB1, IOB2, BIOES, BILOU, BMES."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

Scheme = Literal["iob1", "iob2", "bioes", "bilou", "bmes"]
Tag = tuple[str, str]  # letter and type
Entity = tuple[str, int, int]
"""Type, first word, and the word after the last."""

LETTERS: dict[Scheme, str] = {"iob1": "BI", "iob2": "BI", "bioes": "BIES", "bilou": "BILU", "bmes": "BMES"}
ALL_LETTERS = "BIESLUM"
OUTSIDE: Tag = ("O", "_")
SAME = str.maketrans("LUM", "ESI")  # BILOU and BMES are BIOES with other letters


def fits(names: Iterable[str], letters: str) -> bool:
    """Say whether all of these tags are O, one of the letters, or a letter, "-" and a type; one at least not O."""
    inside = [name for name in names if name != "O"]
    return bool(inside) and all(name and name[0] in letters and name[1:2] in ("", "-") for name in inside)


def detect(names: Iterable[str], sentences: Iterable[Sequence[str | None]]) -> Scheme | None:
    """Return the scheme that a set of tags is of, None if of none.

    IOB1 and IOB2 have the same tags: in IOB1 the sentences begin most entities with I.
    """
    names = list(names)
    if fits(names, LETTERS["iob2"]):
        begun = [letter for sentence in sentences for letter in _first_letters(sentence)]
        return "iob1" if begun.count("I") > begun.count("B") else "iob2"
    return next((scheme for scheme, letters in LETTERS.items() if fits(names, letters)), None)


def entities(tags: Sequence[str | None], scheme: Scheme | None = None) -> list[Entity]:
    """Return the entities of a sentence, in order; a word without a tag (None) is outside of them all.

    Without a scheme as conlleval and seqeval's default mode have it: whatever letters an entity is spelt with, it goes
    on as long as its type does and nothing begins or ends. With a scheme as seqeval's strict mode has it: only what is
    spelt by the scheme's rules is an entity.
    """
    marks = [split(tag) for tag in tags]
    return _lenient(marks) if scheme is None else _strict(marks, scheme)


def split(tag: str | None) -> Tag:
    """Return letter and type: "B-PER" → ("B", "PER"); a bare letter has the type "_"."""
    return (tag[0].translate(SAME), tag[2:] or "_") if tag and tag != "O" else OUTSIDE


def _first_letters(sentence: Sequence[str | None]) -> list[str]:
    marks = [OUTSIDE, *map(split, sentence)]
    return [
        mark[0] for before, mark in pairwise(marks) if mark[0] != "O" and (before[0] == "O" or before[1] != mark[1])
    ]


def _goes_on(before: Tag, mark: Tag) -> bool:
    return mark[0] in "IE" and before[0] in "BI" and mark[1] == before[1]


def _lenient(marks: Sequence[Tag]) -> list[Entity]:
    found: list[Entity] = []
    before, first = OUTSIDE, 0
    for place, mark in enumerate([*marks, OUTSIDE]):
        if not _goes_on(before, mark):
            if before[0] != "O":
                found.append((before[1], first, place))
            first = place
        before = mark
    return found


def _strict(marks: Sequence[Tag], scheme: Scheme) -> list[Entity]:
    found: list[Entity] = []
    around = [OUTSIDE, *marks, OUTSIDE]  # the mark of word 0 stands at 1
    place = 1
    while place <= len(marks):
        end = place + 1
        if _begins(around[place - 1], around[place], scheme):
            while _goes_on(around[end - 1], around[end]):
                end += 1
            if _is_whole(around[end - 1], around[end], scheme):
                found.append((around[place][1], place - 1, end - 1))
        place = end
    return found


def _begins(before: Tag, mark: Tag, scheme: Scheme) -> bool:
    """In IOB1, B is only for an entity right after one of its own type, and I for any other."""
    if scheme == "iob1":
        alike = before[1] == mark[1]
        return (mark[0] == "I" and not (before[0] == "I" and alike)) or (mark[0] == "B" and before[0] in "BI" and alike)
    return mark[0] in "BS"


def _is_whole(last: Tag, after: Tag, scheme: Scheme) -> bool:
    """Say whether an entity may end between these two. (seqeval takes none that ends before a B which IOB1 forbids.)"""
    if scheme == "iob1":
        return not (last[0] == after[0] == "B" and last[1] != after[1])
    return scheme == "iob2" or last[0] in "ES"
