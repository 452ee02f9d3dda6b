"""The choices of a row and which of them is right, in the shapes in which data sets say that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from data.source import Rows, named
from train.tasks._labels import distinct


@dataclass(frozen=True)
class Choices:
    """Where the choices of a row stand, and the right one: given by its own label, by place or by letter from A."""

    columns: tuple[str, ...]
    label: str
    first: int = 0
    """The number of the first place."""

    @classmethod
    def found(cls, columns: tuple[str, ...], label: str, rows: Sequence[Rows]) -> Choices:
        """Return them with the number of the first place: 0, or 1 where the training rows can mean nothing else.

        That is so where no row says 0, and one says a number that is as high as its choices are many.
        """
        plain = cls(columns, label)
        numbers = {int(value) for part in rows for value in map(_spelt, distinct(part, label)) if value.isdecimal()}
        if not numbers or min(numbers) != 1:
            return plain
        wanted = [*columns, label]
        for part in rows:
            for batch in part.dataset.select_columns(wanted).iter(1000):
                cells = named(batch, part.dataset.features)
                for values in zip(*(cells[name] for name in wanted), strict=True):
                    row = dict(zip(wanted, values, strict=True))
                    texts, keys = plain.of(row)
                    if not keys and _spelt(row[label]) == str(len(texts)):
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
            return f"{self.label!r} is {row[self.label]!r}, which is none of the {len(texts)} choices: {known}"
        return None


def _spelt(label: Any) -> str:
    """Return a label as text; a whole number may come as a float, from a column with gaps."""
    return str(int(label) if isinstance(label, float) and label.is_integer() else label).strip()
