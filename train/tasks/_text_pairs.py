"""Pairs of texts: their columns, their hard negatives, their scores and what these mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import UserError
from data.source import Rows, check_columns
from train.tasks import _labels

TEXTS = (
    ("anchor", "positive"),
    ("query", "positive"),
    ("query", "answer"),
    ("query", "passage"),
    ("query", "document"),
    ("question", "answer"),
    ("question", "context"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text_a", "text_b"),
)
NEGATIVES = ("negative", "hard_negative")  # and negative_0, negative_1, ...
SCORES = ("score", "similarity_score", "similarity", "label")
IDLE = {"cosine": ("negatives", "scale", "symmetric"), "contrastive": ("score", "range")}
"""The keys that mean nothing for a kind."""


@dataclass(frozen=True)
class Pairs:
    """The columns of texts (a pair, then hard negatives), that of the scores, and the scores that mean 0 and 1.

    Without a column of scores all pairs belong together; without a range scores are cosines as they stand.
    """

    texts: tuple[str, ...]
    score: str | None = None
    range: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Say what was found in the data."""
        if not self.score:
            hard = f", hard negatives {', '.join(self.texts[2:])}" if self.texts[2:] else ""
            return f"contrastive: {self.texts[0]} → {self.texts[1]}{hard}"
        scaled = f"{self.range[0]:g} to {self.range[1]:g} as 0 to 1" if self.range else "as it stands"
        return f"cosine: {' + '.join(self.texts)} → {self.score}, {scaled}"

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Texts must not be empty, nor a negative equal to its positive; scores are numbers within their range."""
        for name in self.texts:
            if not isinstance(row[name], str):
                return f"{name!r} must be text, not {row[name]!r}"
            if not row[name].strip():
                return f"{name!r} is empty"
        for name in self.texts[2:]:
            if row[name] == row[self.texts[1]]:
                return f"{name!r} is the same text as {self.texts[1]!r}: right and wrong at once"
        if not self.score:
            return None
        value, (low, high) = _labels.number(row[self.score]), self.range or (-1.0, 1.0)
        if value is None:
            return f"{self.score!r} must be a number, not {row[self.score]!r}"
        if low <= value <= high:
            return None
        return f"{self.score!r} is {value:g}; scores go from {low:g} to {high:g} (see task.range)"

    def unusable(self, sizes: Sequence[Sequence[int]]) -> list[tuple[int, str]]:
        """Say which rows have a text of which the tokenizer leaves nothing: `sizes` are the tokens of each text."""
        empty = [(place, lengths.index(0)) for place, lengths in enumerate(sizes) if 0 in lengths]
        return [(place, f"the tokenizer leaves nothing of {self.texts[text]!r}") for place, text in empty]


def find(config: Any, rows: Sequence[Rows]) -> Pairs:
    """Return the pairs of these training rows; raise `UserError` for what they lack, and keys that mean nothing."""
    there = rows[0].dataset.column_names
    pair = config.text or next((names for names in TEXTS if {*names} <= {*there}), TEXTS[0])
    usual = next((name for name in SCORES if name in there), SCORES[0] if config.kind == "cosine" else None)
    score = None if config.kind == "contrastive" else config.score or usual
    kind = "cosine" if score else "contrastive"
    for key in IDLE[kind]:
        if getattr(config, key) != type(config).model_fields[key].default:
            other = "contrastive" if score else "cosine, which needs a column of scores"
            raise UserError(f"task.{key} cannot take effect: the kind is {kind} (see task.kind); it is for {other}")
    numbered = [name for name in there if name.removeprefix("negative_").isdecimal()]
    negatives = () if score else config.negatives or (*(name for name in NEGATIVES if name in there), *numbered)
    texts = (*pair, *negatives)
    wanted = [*texts, *([score] if score else [])]
    check_columns(rows, wanted, "task (choose columns with task.text, task.negatives and task.score)")
    return Pairs(texts, score, _range(rows, score, config.range) if score else None)


def _range(rows: Sequence[Rows], score: str, chosen: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the scores that mean 0 and 1; None where they are cosines as they stand."""
    if chosen:
        if not chosen[0] < chosen[1]:
            raise UserError(f"task.range: {list(chosen)} must go from a lower to a higher score")
        return chosen
    for part in rows:
        if hasattr(part.dataset.features[score], "names"):
            raise UserError(
                f"{part.name}: the column {score!r} holds classes, not scores; set task.kind=contrastive if all pairs "
                "belong together, or task.score to a column of numbers"
            )
    given = (_labels.number(value) for part in rows for value in _labels.distinct(part, score, "score"))
    values = [value for value in given if value is not None]
    if not values:
        raise UserError(
            f"{rows[0].name}: the column {score!r} holds no numbers; choose the scores with task.score, or set "
            "task.kind=contrastive if all pairs belong together"
        )
    low, high = min(values), max(values)
    return None if low >= -1 and high <= 1 else (min(0.0, low), high)
