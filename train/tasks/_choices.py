"""The choices of a row and which of them is right, in the shapes in which data sets say that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from data.source import Rows, named
from train.tasks._labels import distinct


@dataclass(frozen=True)
class Choices:
    """Where the choices of a row stand, and the right one: by its own label, by place, by letter from A, or by text."""

    columns: tuple[str, ...]
    label: str
    first: int = 0
    """The number of the first place."""
    by_text: bool = False
    """Whether the right choice is given as its text, which comes first then: "2" is the choice "2", not the third."""

    @classmethod
    def found(cls, columns: tuple[str, ...], label: str, rows: Sequence[Rows]) -> Choices:
        """Return them as the training rows show: whether places are counted from 0 or 1, or choices given as texts.

        From 1 where no row says 0, and one says a number that is as high as its choices are many. As texts where a row
        says what is no number, letter or label, but one of its choices.
        """
        plain = cls(columns, label)
        names = {value for part in rows for value in map(_spelt, distinct(part, label))}
        numbers = {int(name) for name in names if name.isdecimal()}
        from_one = bool(numbers) and min(numbers) == 1
        spelt_out = any(len(name) > 1 and not name.isdecimal() for name in names)
        if not from_one and not spelt_out:
            return plain
        for row in _rows(rows, [*columns, label]):
            texts, keys = plain.of(row)
            name = _spelt(row[label])
            if spelt_out and not name.isdecimal() and name not in keys and name in map(_spelt, texts):
                return cls(columns, label, by_text=True)
            if from_one and not spelt_out and not keys and name == str(len(texts)):
                return cls(columns, label, first=1)
        return plain

    def of(self, row: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
        """Return the choices of a row, and their labels where they have some of their own.

        Lists of texts, {label: text, ...}, lists of {text, label} or, as `datasets` stores those, {text: [...], label:
        [...]}; with a column for each choice, empty cells at the end mean that the row has fewer.
        """
        if len(self.columns) > 1:
            cells = [row[name] for name in self.columns]
            while cells and (cells[-1] is None or not str(cells[-1]).strip()):
                cells.pop()
            return cells, []
        value = row[self.columns[0]] or []
        if isinstance(value, list) and all(isinstance(choice, dict) for choice in value):
            value = {name: [choice.get(name) for choice in value] for name in ("text", "label")}
        if isinstance(value, dict) and not {"text", "label"} & value.keys():  # {A: ..., B: ...}
            value = {
                "text": [text for text in value.values() if text is not None],
                "label": [key for key, text in value.items() if text is not None],
            }
        if isinstance(value, dict):
            return list(value.get("text") or []), [str(key) for key in value.get("label") or [] if key is not None]
        return value, []

    def right(self, row: Mapping[str, Any]) -> int | None:
        """Return the place of the right choice, from 0.

        Where choices have labels, a place counts only if none of these is a number, and a letter not at all.
        """
        texts, keys = self.of(row)
        name = _spelt(row[self.label])
        if self.by_text and (found := [place for place, text in enumerate(texts) if _spelt(text) == name]):
            return found[0] if len(found) == 1 else None
        if name in keys:
            return keys.index(name)
        if name.isdecimal() and not any(key.isdecimal() for key in keys):
            place = int(name) - self.first
            return place if 0 <= place < len(texts) else None
        name = name.upper()
        letters = "" if keys else ascii_uppercase[: len(texts)]
        return letters.index(name) if len(name) == 1 and name in letters else None

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Say what is wrong: at least two choices that are not blank are wanted, and a label that is one of them."""
        texts, keys = self.of(row)
        where, value = ", ".join(map(repr, self.columns)), row[self.columns[0]]
        if len(self.columns) == 1 and value is not None and not isinstance(value, list | dict):
            return f"{where} must be a list, not {value!r}; name a column for each choice with task.choices: [...]"
        if len(texts) < 2:
            return f"{where}: {'one choice' if texts else 'no choices'}, where at least two are needed"
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                return f"{where}: choice {place} (from 0) must be text, not {text!r}"
            if not text.strip():
                return f"{where}: choice {place} (from 0) is empty"
        if keys and not len(set(keys)) == len(keys) == len(texts):
            return f"{where}: {len(texts)} choices need as many different labels, not {', '.join(keys)}"
        if self.right(row) is None:
            places = f"{self.first} to {len(texts) - 1 + self.first}, or {' '.join(ascii_uppercase[: len(texts)])}"
            known = ", ".join(keys) if keys else places
            known = "the text of one of them" if self.by_text else known
            return f"{self.label!r} is {row[self.label]!r}, which is none of the {len(texts)} choices: {known}"
        return None


def _rows(rows: Sequence[Rows], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for part in rows:
        for batch in part.dataset.select_columns(columns).iter(1000):
            cells = named(batch, part.dataset.features)
            for values in zip(*(cells[name] for name in columns), strict=True):
                yield dict(zip(columns, values, strict=True))


def _spelt(label: Any) -> str:
    """Return a label as text; a whole number may come as a float, from a column with gaps."""
    return str(int(label) if isinstance(label, float) and label.is_integer() else label).strip()
