"""Encoded examples, memory-mapped: any of them read alone, as columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.mapped import MappedColumns
from data.tables import arrays

if TYPE_CHECKING:
    from datasets import Dataset

ASKED = 2**28
"""Bytes of examples from which on rows are asked for ahead: less is soon in memory. Of 256 rows it takes 4 ms."""

REAL = "real_tokens"
"""The column of an example's tokens where it is several sequences: its `length` is what they take when computed, each
as long as the longest."""

Features = dict[str, Any]
"""Columns of some rows: an array (n,) for a number a row, a list of n arrays for a sequence a row."""


@dataclass(frozen=True)
class Encoded:
    """The encoded examples of one role, memory-mapped. An example's id is its place here.

    `sizes` are the examples of each source; the column `row` is the place in its source, bad rows counted, of the row
    that an example comes from (the first one, if from several; `rows`, where a task gives it, has them all).
    """

    dataset: Dataset
    sizes: tuple[int, ...]
    skipped: tuple[str, ...]
    longest: int
    """Examples as long as `max_length`: these were cut, or just fit."""
    fingerprint: str
    """Of the examples themselves, wherever the rows and the cache lie."""
    beside: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Columns of numbers that no encoder can know, by name: (n, ...), the examples first."""
    partial: bool = False  # whether these are only the first of a stream
    alone: bool = False
    """Whether the system reads what is looked at and nothing around it: where memory has no room for them, or where it
    is asked ahead."""

    @property
    def size(self) -> int:
        """Bytes of their files."""
        return sum(Path(file["filename"]).stat().st_size for file in self.dataset.cache_files)

    def features(self, ids: NDArray[np.int64]) -> Features:
        """Return the columns of the examples `ids`, in that order. Reads only those rows: O(len(ids))."""
        columns = self._columns.take(ids) if self._columns.simple and len(ids) else None
        if columns is None:
            columns = arrays(self._tables[ids])
        return {**columns, **{name: np.asarray(values[ids]) for name, values in self.beside.items()}}

    @cached_property
    def asked(self) -> bool:
        """Whether there is so much that it is worth while to ask for rows before they are looked at."""
        return self.size >= ASKED

    def ask(self, ids: NDArray[np.int64], *, lists: bool) -> None:
        """Let the system read the lists of these examples, or (before that) all else of them, in the meantime."""
        if self._columns.simple and len(ids):
            self._columns.ask(ids, lists=lists)

    def lengths(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return the lengths of the examples `ids`, (n,), and read nothing else of them."""
        return self._numbers(ids, "length")

    def tokens(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return the real tokens of the examples `ids`, (n,), and read nothing else of them."""
        return self._numbers(ids, self.real)

    @property
    def real(self) -> str:
        """The column of real tokens."""
        return REAL if REAL in self.dataset.column_names else "length"

    def _numbers(self, ids: NDArray[np.int64], name: str) -> NDArray[Any]:
        columns = self._columns.take(ids, only=(name,)) if self._columns.simple and len(ids) else None
        found: NDArray[Any] = self.features(ids)[name] if columns is None else columns[name]
        return found

    @cached_property
    def _columns(self) -> MappedColumns:
        """The same where they lie, if that is simple: a row so takes 1 us, from a table 15."""
        mapped = MappedColumns(self.dataset.data.table, alone=self.alone)
        mapped.simple = mapped.simple and self.dataset._indices is None
        return mapped

    @cached_property
    def _tables(self) -> Dataset:
        """The same as Arrow tables: `with_format` copies and hashes, longer than a batch takes to read."""
        return self.dataset.with_format("arrow")

    def sources(self, ids: NDArray[np.int64]) -> dict[str, list[int]]:
        """Return {"sources": the place of each example's source}, from 0; {} where there is only one source."""
        if len(self.sizes) == 1:
            return {}
        return {"sources": np.searchsorted(np.cumsum(self.sizes), ids, side="right").tolist()}

    def column(self, name: str) -> NDArray[Any]:
        """Return one whole number column: O(rows) memory, for evaluation and statistics only."""
        return np.asarray(self.dataset.data.column(name).to_numpy())

    def computed(self, *, padding_free: bool) -> NDArray[Any]:
        """Return the tokens that each example takes when it is computed, (rows,), in O(rows) memory."""
        return self.column(self.real if padding_free else "length")

    def places(self) -> list[dict[str, int]]:
        """Return for each example {"row": its place in its source, from 0}, with "source" where there are several."""
        rows = self.column("row").tolist()
        sources = self.sources(np.arange(len(rows))).get("sources")
        return [{**({"source": sources[example]} if sources else {}), "row": row} for example, row in enumerate(rows)]


def take(features: Features, rows: NDArray[np.int64]) -> Features:
    """Return the features of some rows, in that order."""
    whole = features.items()
    return {
        name: value[rows] if isinstance(value, np.ndarray) else [value[row] for row in rows] for name, value in whole
    }
