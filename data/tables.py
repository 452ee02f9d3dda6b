"""Columns of encoded examples ↔ Arrow tables."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

GROUP = 2**25
"""Bytes written at once. Each such chunk costs 0.2 ms and 10 KB whenever the file is opened, however few are read."""


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


def grouped(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in tables of one chunk each, of `GROUP` bytes at least, but for the last."""
    import pyarrow as pa

    group, size = list[pa.Table](), 0
    for table in tables:
        group.append(table)
        size += table.nbytes
        if size >= GROUP:
            yield pa.concat_tables(group).combine_chunks()
            group, size = [], 0
    if group:
        yield pa.concat_tables(group).combine_chunks()


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

    Of each chunk that was come upon it keeps where its columns begin, about 1 KB a column: of `GROUP` bytes, so that
    this is nothing beside them.
    """

    def __init__(self, table: pa.Table, *, alone: bool = False) -> None:
        """alone: whether the system is to read what is looked at and nothing around it (see `_alone`)."""
        self.table, self.alone = table, alone
        sizes = [[len(chunk) for chunk in column.chunks] for column in table.columns]
        self._chunks: list[tuple[Any, ...] | None] = [None] * len(sizes[0])
        self._ends = np.cumsum(sizes[0])
        self.simple = all(map(_simple, table.schema.types)) and all(each == sizes[0] for each in sizes)
        """Whether all columns are numbers, or lists of numbers: others are not read by this."""

    def take(self, ids: NDArray[np.int64], only: Collection[str] | None = None) -> dict[str, Any] | None:
        """Return the columns of the rows `ids` (of these names), in that order, as `arrays` does.

        None where something is missing in a chunk that they lie in: then this is no way to read this table.
        """
        numbers = self._ends.searchsorted(ids, side="right")
        places = (ids - np.where(numbers > 0, self._ends[numbers - 1], 0)).tolist()
        chunks = [self._chunks[number] or self._look(number) for number in numbers.tolist()]
        if not self.simple:
            return None
        found: dict[str, Any] = {}
        for column, (name, kind) in enumerate(zip(self.table.column_names, self.table.schema.types, strict=True)):
            if only is not None and name not in only:
                continue
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
        chunks = [column.chunk(number) for column in self.table.columns]
        if any(chunk.null_count or (hasattr(chunk, "offsets") and chunk.values.null_count) for chunk in chunks):
            self.simple = False
            return ()
        if self.alone:
            _alone(
                [buffer for chunk in chunks for buffer in chunk.buffers() if buffer]
            )  # not empty ones, which are nowhere
        columns = tuple(map(_lying, chunks))
        self._chunks[number] = columns
        return columns


def _alone(buffers: list[pa.Buffer]) -> None:
    """Tell the system that neighbours in this part of a file will not be needed soon, where it can be told.

    It otherwise reads some 5 MB around each page that is not in memory, 76 MB for 32 rows from anywhere: soon all of a
    file that memory has room for, but what is thrown away again of one that is larger.
    """
    if sys.platform not in ("linux", "darwin"):
        return
    first = min(buffer.address for buffer in buffers) // mmap.PAGESIZE * mmap.PAGESIZE
    last = max(buffer.address + buffer.size for buffer in buffers)
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    library.madvise(first, last - first, mmap.MADV_RANDOM)  # advice: where it is not taken, nothing is lost


def _lying(array: pa.Array) -> Any:
    if hasattr(array, "offsets"):
        return array.values.to_numpy(), memoryview(array.offsets.to_numpy())
    return memoryview(array.to_numpy())  # gives plain numbers, which is faster


def _simple(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_list(kind) else kind
    return bool(pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind))
