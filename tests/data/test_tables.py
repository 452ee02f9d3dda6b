"""Rows of memory-mapped tables: looked at where they lie, the same as Arrow gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as some

from data.encode import Encoded
from data.tables import MappedColumns, arrays, table_of

SIZES = (5, 1, 0, 9, 2)


def table(sizes: tuple[int, ...] = SIZES) -> pa.Table:
    """Chunks of these sizes: lists, empty ones too, whole and broken numbers."""
    rows = np.arange(sum(sizes))
    ends = np.cumsum(sizes)
    parts = [
        table_of(
            {
                "input_ids": [[*range(row, row + row % 4)] for row in part],
                "label": [row / 3 for row in part],
                "length": [row % 4 for row in part],
                "row": [row + 2**40 for row in part],
            }
        )
        for part in (rows[end - size : end].tolist() for size, end in zip(sizes, ends, strict=True) if size)
    ]
    return pa.concat_tables(parts)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert isinstance(found[name], type(values)) and len(found[name]) == len(values)
        for one, other in zip(found[name], values, strict=True):
            assert np.array_equal(one, other) and one.dtype == other.dtype


@given(ids=some.lists(some.integers(0, sum(SIZES) - 1), min_size=1, max_size=30), cut=some.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_rows_are_those_of_the_table(ids: list[int], cut: int) -> None:
    """In any order, again and again, also where the table is a part of another."""
    whole = table().slice(cut)
    places = np.array(ids, dtype=np.int64) % len(whole)
    mapped = MappedColumns(whole)
    assert mapped.simple
    for _ in range(2):
        same(mapped.take(places), arrays(whole.take(places)))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None, 3]),
        pa.array([[1], None, [3]]),
        pa.array([[1], [None], [3]]),
        pa.array(["a", "b", "c"]),
        pa.array([[[1]], [[2]], [[3]]]),
        pa.array([True, False, True]),
        pa.chunked_array([[1], [2, 3]]),
    ],
)
def test_what_is_not_as_simple_is_left_to_arrow(column: Any) -> None:
    assert not MappedColumns(pa.table({"input_ids": pa.array([[1], [2], []]), "other": column})).simple


def test_examples_are_read_both_ways_alike(tmp_path: Path) -> None:
    """From a file as it lies; and as chosen rows of it, which are no file."""
    whole = table()
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    dataset = Dataset.from_file(str(tmp_path / "a.arrow"))
    ids = np.array([16, 0, 5, 5, 9])
    mapped = Encoded(dataset, (17,), (), 0, "")
    assert mapped._columns is not None
    same(mapped.features(ids), arrays(whole.take(ids)))
    chosen = Encoded(dataset.select([*range(16, -1, -1)]), (17,), (), 0, "")
    assert chosen._columns is None
    same(chosen.features(16 - ids), arrays(whole.take(ids)))
    part = Encoded(dataset.select(range(3, 14)), (11,), (), 0, "")
    same(part.features(np.array([10, 0, 4])), arrays(whole.take([13, 3, 7])))
    same(mapped.features(ids[:0]), arrays(whole.take(ids[:0])))
