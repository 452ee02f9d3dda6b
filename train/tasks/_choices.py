"""The choices of a row and which of them is right, in the shapes in which data sets say that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal, get_args

from data.errors import UserError
from data.source import Rows, named

Reading = Literal["from_0", "from_1", "text"]
LOOKED_AT = 10_000  # rows of a file that tell how the right choice is given


@dataclass(frozen=True)
class Choices:
    """Where the choices of a row stand, and the right one.

    It is given by its own label where choices have labels, by place or letter from A; or, with the reading "text", by
    its text: "2" is the choice "2" then, not the third.
    """

    columns: tuple[str, ...]
    label: str
    reading: Reading = "from_0"

    @property
    def first(self) -> int:
        """The number of the first place."""
        return int(self.reading == "from_1")

    @classmethod
    def found(cls, columns: tuple[str, ...], label: str, rows: Sequence[Rows]) -> Choices:
        """Return them with the reading by which most of the training rows have a right choice; from 0, if others find
        no more. Raises `UserError` where texts are as good a reading as places, and other choices are right then.
        """
        readings = {name: cls(columns, label, name) for name in get_args(Reading)}
        counts, unlike = dict.fromkeys(readings, 0), dict.fromkeys(readings, False)
        for row in _rows(rows, [*columns, label]):
            if readings["text"].unfit(row) is None:
                places = {name: choices.right(row) for name, choices in readings.items()}
                for name, place in places.items():
                    counts[name] += place is not None
                    unlike[name] |= places["text"] not in (place, None)
        best = "from_0" if counts["from_0"] >= counts["from_1"] else "from_1"
        if counts["text"] == counts[best] > 0 and unlike[best]:
            raise UserError(
                f"the column {label!r} may hold places or letters of choices as well as their texts, and other choices "
                "would be right. Say which: task.label_is: from_0, from_1 or text"
            )
        return readings["text" if counts["text"] > counts[best] else best]

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

        Where choices have labels, a place counts only if none of these is a number, and a letter not at all. A text
        counts only if a single choice has it.
        """
        if row[self.label] is None:
            return None
        texts, keys = self.of(row)
        name = _spelt(row[self.label])
        if self.reading == "text":
            found = [place for place, text in enumerate(texts) if _spelt(text) == name]
            return found[0] if len(found) == 1 else None
        if name in keys:
            return keys.index(name)
        if name.isdecimal() and not any(key.isdecimal() for key in keys):
            place = int(name) - self.first
            return place if 0 <= place < len(texts) else None
        name = name.upper()
        letters = "" if keys else ascii_uppercase[: len(texts)]
        return letters.index(name) if len(name) == 1 and name in letters else None

    def some_label(self, row: Mapping[str, Any]) -> Any:
        """Return what could stand for the right choice: how one that is usable is given in this row; None, if none."""
        if self.unfit(row):
            return None
        texts, keys = self.of(row)
        return next(
            (key for key in (*keys, self.first, *texts) if self.right({**row, self.label: key}) is not None), None
        )

    def unfit(self, row: Mapping[str, Any]) -> str | None:
        """Say what is wrong with the choices: two or more that are not blank are wanted, and labels for all or none."""
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
        return None

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Say what is wrong with the choices, or with the label: it must be one of them."""
        if problem := self.unfit(row):
            return problem
        if self.right(row) is not None:
            return None
        texts, keys = self.of(row)
        if self.reading == "text":
            shown = f"{self.label!r} is {row[self.label]!r}"
            return f"{shown}, which is not the text of one of the {len(texts)} choices alone"
        places = f"{self.first} to {len(texts) - 1 + self.first}, or {' '.join(ascii_uppercase[: len(texts)])}"
        known = ", ".join(keys) if keys else places
        return f"{self.label!r} is {row[self.label]!r}, which is none of the {len(texts)} choices: {known}"


def _rows(rows: Sequence[Rows], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for part in rows:
        dataset = part.dataset.select_columns(columns)
        for batch in dataset.select(range(min(len(dataset), LOOKED_AT))).iter(1000):
            cells = named(batch, part.dataset.features)
            for values in zip(*(cells[name] for name in columns), strict=True):
                yield dict(zip(columns, values, strict=True))


def _spelt(label: Any) -> str:
    """Return a label as text; a whole number may come as a float, from a column with gaps."""
    return str(int(label) if isinstance(label, float) and label.is_integer() else label).strip()
