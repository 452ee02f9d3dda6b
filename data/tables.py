"""Columns of encoded examples ↔ Arrow tables."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

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
