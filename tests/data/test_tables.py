"""Rows of memory-mapped tables: looked at where they lie, the same as Arrow gives them."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as some

from data import tables
from data.encoded import Encoded
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
        same(mapped.take(places) or {}, arrays(whole.take(places)))
    same(mapped.take(places, only=("row",)) or {}, {"row": arrays(whole.take(places))["row"]})


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
    whole = pa.table({"input_ids": pa.array([[1], [2], []]), "length": [1, 2, 3], "other": column})
    mapped, places = MappedColumns(whole), np.array([2, 0])
    assert not mapped.simple or mapped.take(places) is None
    assert not mapped.simple
    encoded = Encoded(Dataset(whole), (3,), (), 0, "")
    for _ in range(2):
        assert encoded.features(places)["other"][0] == arrays(whole.take(places))["other"][0]
        assert encoded.lengths(places).tolist() == [3, 1]


def test_what_is_missing_in_another_chunk_is_found_when_it_is_come_upon() -> None:
    whole = pa.concat_tables(
        [pa.table({"length": [1, 2]}), pa.table({"length": [None, 4]}, pa.schema([("length", "int64")]))]
    )
    encoded = Encoded(Dataset(whole), (4,), (), 0, "")
    assert encoded.features(np.array([1]))["length"].tolist() == [2]
    assert encoded._columns.simple
    assert encoded.features(np.array([3, 0]))["length"].tolist() == [4, 1]
    assert not encoded._columns.simple


def test_tables_are_put_together_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows in the same order, in chunks of at least so many bytes."""
    parts = [pa.table({"row": np.arange(start, start + 10)}) for start in range(0, 70, 10)]
    for size, expected in ((1, [10] * 7), (161, [30, 30, 10]), (10**6, [70])):
        monkeypatch.setattr(tables, "GROUP", size)
        found = list(tables.grouped(iter(parts)))
        assert [len(each) for each in found] == expected
        assert all(each.column("row").num_chunks == 1 for each in found)
        assert pa.concat_tables(found).column("row").to_pylist() == [*range(70)]
    assert list(tables.grouped(iter(()))) == []


def test_examples_are_read_both_ways_alike(tmp_path: Path) -> None:
    """From a file as it lies; and as chosen rows of it, which are no file."""
    whole = table()
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    dataset = Dataset.from_file(str(tmp_path / "a.arrow"))
    ids = np.array([16, 0, 5, 5, 9])
    mapped = Encoded(dataset, (17,), (), 0, "")
    assert mapped._columns.simple
    same(mapped.features(ids), arrays(whole.take(ids)))
    chosen = Encoded(dataset.select([*range(16, -1, -1)]), (17,), (), 0, "")
    assert not chosen._columns.simple
    same(chosen.features(16 - ids), arrays(whole.take(ids)))
    for found in (mapped.lengths(ids), chosen.lengths(16 - ids)):
        assert found.tolist() == whole.column("length").take(ids).to_pylist()
    assert mapped.lengths(ids[:0]).tolist() == chosen.lengths(ids[:0]).tolist() == []
    part = Encoded(dataset.select(range(3, 14)), (11,), (), 0, "")
    same(part.features(np.array([10, 0, 4])), arrays(whole.take([13, 3, 7])))
    same(mapped.features(ids[:0]), arrays(whole.take(ids[:0])))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a file cannot be forgotten here")
def test_of_files_larger_than_memory_little_else_is_read(tmp_path: Path) -> None:
    """Counted by the system, of a file that it was told to forget."""
    rows = 200_000
    ids = pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * 40, np.ones(40 * rows, dtype=np.int32))
    whole = pa.table({"row": np.arange(rows), "input_ids": ids, "length": np.full(rows, 40, dtype=np.int32)})
    file = tmp_path / "a.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    chosen = np.random.default_rng(0).integers(0, rows, 20)

    def read(**how: bool) -> int:
        """Return the bytes that come from the disk for some rows."""
        gc.collect()  # what is mapped is not forgotten
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        encoded = Encoded(Dataset.from_file(str(file)), (rows,), (), 0, "", **how)  # type: ignore[arg-type]
        before = _from_disk()
        same(encoded.features(chosen), arrays(whole.take(chosen)))
        return _from_disk() - before

    assert Encoded(Dataset.from_file(str(file)), (rows,), (), 0, "").size == file.stat().st_size > 30e6
    everything = read()
    if everything < 10e6:
        pytest.skip("nothing is read ahead here: memory is the disk, or another system")
    assert read(larger_than_memory=True) < everything / 10


def test_a_part_of_a_file_is_told_of_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a column is a list of nothing, which lies nowhere."""
    whole = table_of({"row": [*range(9)], "labels": [[]] * 9, "length": [3] * 9})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    told = list[tuple[int, int, int]]()
    library = SimpleNamespace(madvise=lambda *given: told.append(given))
    monkeypatch.setattr(tables.ctypes, "CDLL", lambda _: library)
    dataset = Dataset.from_file(str(tmp_path / "a.arrow"))
    found = Encoded(dataset, (9,), (), 0, "", larger_than_memory=True).features(np.array([8, 0]))
    same(found, arrays(whole.take([8, 0])))
    ((first, size, advice),) = told
    assert first % mmap.PAGESIZE == 0 and 0 < size < 3 * mmap.PAGESIZE and advice == mmap.MADV_RANDOM


def _from_disk() -> int:
    """Return the bytes that were read from the disk for this process; 0 where nobody counts them."""
    counts = Path("/proc/self/io")
    lines = counts.read_text().splitlines() if counts.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)
