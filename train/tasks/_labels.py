"""Label names from ClassLabel columns, strings, integers, or the config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data.errors import UserError
from data.source import Rows, named


@dataclass(frozen=True)
class Labels:
    """The labels in the model's order. `by_index` says that a number in the data may be a place in `names`."""

    names: tuple[str, ...]
    by_index: bool = False

    def index(self, value: Any) -> int | None:
        """Return the place of a label given by name or, where no name is a number, by place; None for any other.

        A value means the same whether it is a number or, as in a csv, the text of one.
        """
        name = str(value)
        if name in self.names:
            return self.names.index(name)
        if self.by_index and name.isdecimal() and int(name) < len(self.names):
            return None if any(known.isdecimal() for known in self.names) else int(name)
        return None

    def named(self, value: int | list[int]) -> str | list[str]:
        """Return the name of the label at a place; or, of a 0 or 1 for each label, the names of those given."""
        if isinstance(value, list):
            return [name for name, given in zip(self.names, value, strict=True) if given]
        return self.names[value]


def kind(rows: Rows, column: str) -> Literal["single_label", "multi_label", "regression"]:
    """Return the kind of labels that a column holds; fractions written as text, as in a csv, are fractions too."""
    from datasets import Value

    feature = rows.dataset.features[column]
    if not isinstance(feature, Value):
        return "multi_label" if hasattr(feature, "feature") else "single_label"  # a list; a ClassLabel
    if feature.dtype.startswith("float"):
        return "regression"
    if "string" in feature.dtype:
        values = distinct(rows, column)
        if values and all(_is_number(value) for value in values) and any("." in value for value in values):
            return "regression"
    return "single_label"


def find(rows: Sequence[Rows], column: str, names: tuple[str, ...] | None, key: str = "label") -> Labels:
    """Return a column's labels: those of the config, else of a ClassLabel, else all values of the training rows.

    `key` of the task's config chooses the column.
    """
    declared = [_declared(part, column) for part in rows]
    if names is not None and len(set(names)) < len(names):
        raise UserError(f"task.labels: a label is named twice in {', '.join(names)}")
    if names:
        return Labels(tuple(names), by_index=True)
    if all(declared):
        return Labels(tuple(dict.fromkeys(name for part in declared for name in part)), by_index=True)
    values = {value for part in rows for value in distinct(part, column, key)}
    if any(part.first for part in rows):
        raise UserError(
            f"data.streaming: the rows are not all read before training, so name every label of {column!r} in "
            f"task.labels; the first rows hold {', '.join(sorted(map(str, values))) or 'none'}"
        )
    if len(values) < 2:
        raise UserError(
            f"{rows[0].name}: the column {column!r} holds {'one label only' if values else 'no labels'}: "
            f"{', '.join(map(str, values))}; name all labels with task.labels, or choose the column with task.{key}"
        )
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    return Labels(tuple(str(value) for value in (sorted(values) if whole else sorted(values, key=str))))


def _declared(rows: Rows, column: str) -> tuple[str, ...]:
    feature = rows.dataset.features[column]
    return tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())


def distinct(rows: Rows, column: str, key: str = "label") -> set[Any]:
    """All values by name, but missing ones (of a csv: empty ones), which `Task.problem` names row by row."""
    import pyarrow.compute as pc

    found: list[Any] = []
    for chunk in rows.dataset.data.column(column).chunks:
        flat = pc.list_flatten(chunk) if hasattr(chunk, "offsets") else chunk
        if hasattr(flat, "fields") or hasattr(flat, "offsets") or "struct" in str(flat.type):
            raise UserError(f"{rows.name}: the column {column!r} holds {flat.type}, which is no label; see task.{key}")
        found += pc.unique(flat).to_pylist()
    known = named({column: found}, rows.dataset.features) if _declared(rows, column) else {column: found}
    return {value for value in known[column] if value is not None and str(value).strip()}


def refuse_multi_hot(rows: Rows, column: str) -> None:
    """Lists of 0 and 1, all equally long, are places of labels to us and switches to the one who wrote them."""
    first = [value for value in rows.dataset[:200][column] if isinstance(value, list)]
    switches = len(first) > 1 and len({len(value) for value in first}) == 1 and len(first[0]) > 1
    if (
        switches
        and all(part in (0, 1) for value in first for part in value)
        and any(value.count(value[0]) > 1 for value in first)
    ):
        raise UserError(
            f"{rows.name}: the column {column!r} seems to hold a 0 or 1 for every label; give lists of the labels that "
            "a row has, by name or number"
        )


def number(value: Any) -> float | None:
    """Return a finite number, also from a csv's text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
