"""Columns, and fields of columns: `translation.en` is the field en of the column translation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.errors import UserError, nearest
from data.source import Rows, check_columns


def names(rows: Rows) -> list[str]:
    """Return all that can be chosen: columns, and the fields of those that have some."""
    found = []
    for name, feature in rows.dataset.features.items():
        if not name.startswith("__"):
            languages = getattr(feature, "languages", None)  # datasets has a type of its own for translations
            fields = feature if isinstance(feature, dict) else languages or ()
            found += [name, *(f"{name}.{field}" for field in fields)]
    return found


def check(rows: Sequence[Rows], wanted: Sequence[str], where: str) -> None:
    """Raise `UserError` for a file that lacks a column or field, naming what it has."""
    for part in rows:
        there = names(part)
        for name in wanted:
            if name not in there:
                raise UserError(
                    f"{where}: {part.name} has no column {name!r}; it has {', '.join(there)}{nearest(name, there)}"
                )


def column(name: str) -> str:
    """Return the column that a name is of. (One whose own name has a dot cannot be chosen.)"""
    return name.partition(".")[0]


def value(row: Mapping[str, Any], name: str) -> Any:
    """Return a row's value; None for a field of what has no fields."""
    owner, _, field = name.partition(".")
    whole = row[owner]
    return whole if not field else whole.get(field) if isinstance(whole, Mapping) else None


def values(rows: Mapping[str, list[Any]], name: str) -> list[Any]:
    """Return the values of some rows."""
    owner, _, field = name.partition(".")
    return [whole[field] for whole in rows[owner]] if field else rows[owner]


def text_column(rows: Sequence[Rows], chosen: str | None) -> str:
    """Return the column of a task that reads nothing but texts: the chosen one, the usual one, or the only one."""
    texts = [
        name
        for name, feature in rows[0].dataset.features.items()
        if "string" in str(getattr(feature, "dtype", "")) and not name.startswith("__")
    ]
    only = texts[0] if len(texts) == 1 else "text"
    usual = next((name for name in ("text", "document", "content", "sentence") if name in texts), only)
    check_columns(rows, [chosen or usual], "task (choose the column with task.text)")
    return chosen or usual
