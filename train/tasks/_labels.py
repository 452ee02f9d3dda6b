"""Label names from ClassLabel columns, strings, integers, or the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data.errors import UserError
from data.source import Rows


@dataclass(frozen=True)
class Labels:
    """The labels in the model's order. `by_index` says that integers in the data are places in `names`."""

    names: tuple[str, ...]
    by_index: bool = False

    def index(self, value: Any) -> int | None:
        """Return the place of a label given by name or number; None for one outside the set."""
        name = str(value)
        if isinstance(value, int) and not isinstance(value, bool) and self.by_index:
            return value if 0 <= value < len(self.names) else None
        if name in self.names:
            return self.names.index(name)
        if self.by_index and name.isdecimal() and int(name) < len(self.names):  # numbers in a csv are text
            return int(name)
        return None


def kind(feature: Any) -> Literal["single_label", "multi_label", "regression"]:
    """Return the kind of labels that a column of this `datasets` feature holds."""
    from datasets import Value

    if not isinstance(feature, Value):
        return "multi_label" if hasattr(feature, "feature") else "single_label"  # a list; a ClassLabel
    return "regression" if feature.dtype.startswith("float") else "single_label"


def find(rows: Sequence[Rows], column: str, names: tuple[str, ...] | None) -> Labels:
    """Return a column's labels: those of the config, else of a ClassLabel, else all values of the training rows."""
    feature = rows[0].dataset.features[column]
    declared = getattr(getattr(feature, "feature", feature), "names", None)
    if names or declared:
        chosen = tuple(names or declared or ())
        if len(set(chosen)) < len(chosen):
            raise UserError(f"task.labels: a label is named twice in {', '.join(chosen)}")
        return Labels(chosen, by_index=True)
    values = {value for part in rows for value in _values(part, column)}
    if len(values) < 2:
        raise UserError(
            f"{rows[0].name}: the column {column!r} holds {'one label only' if values else 'no labels'}: "
            f"{', '.join(map(str, values))}; name all labels with task.labels, or choose the column with task.label"
        )
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    return Labels(tuple(str(value) for value in (sorted(values) if whole else sorted(values, key=str))))


def _values(rows: Rows, column: str) -> set[Any]:
    """All values but missing ones, which `Task.problem` names row by row."""
    import pyarrow.compute as pc

    found: set[Any] = set()
    for chunk in rows.dataset.data.column(column).chunks:
        found.update(pc.unique(pc.list_flatten(chunk) if hasattr(chunk, "offsets") else chunk).to_pylist())
    return found - {None}
