"""Columns of encoded examples ↔ Arrow tables."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa


def table_of(columns: dict[str, list[Any]]) -> pa.Table:
    """Numbers as int32 (tokens, lengths, labels) or float64; row numbers, which may be large, as int64.

    Lists that are all empty in one chunk (rows without any label) get the type that they have in the others.
    """
    import pyarrow as pa

    arrays = {name: pa.array(values) for name, values in columns.items()}
    small = {pa.int64(): pa.int32(), **dict.fromkeys((pa.list_(pa.int64()), pa.list_(pa.null())), pa.list_(pa.int32()))}
    large = {"row": pa.int64(), "rows": pa.list_(pa.int64())}
    types = {name: large.get(name, small.get(array.type, array.type)) for name, array in arrays.items()}
    return pa.table({name: array.cast(types[name]) for name, array in arrays.items()})


def arrays(table: pa.Table) -> dict[str, Any]:
    """Return the columns of a table of encoded examples."""
    return {name: _array(table.column(name)) for name in table.column_names}


def _array(column: pa.ChunkedArray) -> Any:
    array = column.combine_chunks()
    if not hasattr(array, "offsets"):
        return array.to_numpy(zero_copy_only=False)
    values, offsets = array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()
    return [values[start:end] for start, end in pairwise(offsets)]


class MappedColumns:
    """The columns of a table in a memory-mapped file, for rows from anywhere: looks at those alone, and copies none.

    Of each chunk that was come upon it keeps where its columns begin, about 1 KB a column: 5 MB for 10^8 rows.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._chunks: list[tuple[Any, ...] | None] = [None] * table.column(0).num_chunks
        self._ends = np.cumsum([len(chunk) for chunk in table.column(0).chunks])
        sizes = np.diff(self._ends, prepend=0).tolist()
        self.simple = all(
            _simple(column.type)
            and [len(chunk) for chunk in column.chunks] == sizes
            and not any(
                chunk.null_count or (hasattr(chunk, "offsets") and chunk.values.null_count) for chunk in column.chunks
            )
            for column in table.columns
        )
        """Whether all columns are numbers, or lists of numbers, with nothing missing: others are not read by this."""

    def take(self, ids: NDArray[np.int64]) -> dict[str, Any]:
        """Return the columns of the rows `ids`, in that order, as `arrays` does."""
        numbers = self._ends.searchsorted(ids, side="right")
        places = (ids - np.where(numbers > 0, self._ends[numbers - 1], 0)).tolist()
        chunks = [self._chunks[number] or self._look(number) for number in numbers.tolist()]
        found: dict[str, Any] = {}
        for column, (name, kind) in enumerate(zip(self.table.column_names, self.table.schema.types, strict=True)):
            there = [chunk[column] for chunk in chunks]
            if hasattr(kind, "value_type"):
                pairs = zip(there, places, strict=True)
                found[name] = [values[starts[place] : starts[place + 1]] for (values, starts), place in pairs]
            else:
                picked = [values[place] for values, place in zip(there, places, strict=True)]
                found[name] = np.array(picked, dtype=there[0].format)
        return found

    def _look(self, number: int) -> tuple[Any, ...]:
        """Return the columns of a chunk where they lie: its numbers, or (those of all its lists, where each begins)."""
        columns = tuple(_lying(column.chunk(number)) for column in self.table.columns)
        self._chunks[number] = columns
        return columns


def _lying(array: pa.Array) -> Any:
    if hasattr(array, "offsets"):
        return array.values.to_numpy(), memoryview(array.offsets.to_numpy())
    return memoryview(array.to_numpy())  # gives plain numbers, which is faster


def _simple(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_list(kind) else kind
    return bool(pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind))
