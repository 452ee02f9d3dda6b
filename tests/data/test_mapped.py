"""Rows of memory-mapped tables: looked at where they lie, the same as Arrow gives them."""

from __future__ import annotations

import gc
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as some

from data import advice
from data.encoded import Encoded
from data.mapped import MappedColumns
from data.tables import arrays, table_of

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


def test_several_threads_read_the_same_rows_at_once() -> None:
    """Each comes upon chunks that no other has seen, in front of and behind those that were."""
    whole = table((3,) * 400)
    expected = arrays(whole)

    def read(mapped: MappedColumns, chunks: list[int]) -> None:
        for chunk in chunks:
            found = mapped.take(np.array([3 * chunk, 3 * chunk + 2])) or {}
            assert found["row"].tolist() == [expected["row"][3 * chunk], expected["row"][3 * chunk + 2]]
            assert [each.tolist() for each in found["input_ids"]] == [
                expected["input_ids"][3 * chunk + place].tolist() for place in (0, 2)
            ]

    mapped = MappedColumns(whole)
    turns = [np.random.default_rng(seed).permutation(400).tolist() for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(read, mapped, chunks) for chunks in turns]:
            done.result()


def test_what_was_found_outlives_the_table(tmp_path: Path) -> None:
    """Lists are not copied: what they lie in stays mapped as long as there is one."""
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table())
    found = MappedColumns(Dataset.from_file(str(tmp_path / "a.arrow")).data.table).take(np.array([7])) or {}
    gc.collect()
    assert found["input_ids"][0].tolist() == [7, 8, 9] and not found["input_ids"][0].flags.owndata


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a file cannot be forgotten here")
def test_of_files_alone_little_else_is_read(tmp_path: Path) -> None:
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
        _forget(file)
        encoded = Encoded(Dataset.from_file(str(file)), (rows,), (), 0, "", **how)  # type: ignore[arg-type]
        before = _from_disk()
        same(encoded.features(chosen), arrays(whole.take(chosen)))
        return _from_disk() - before

    assert Encoded(Dataset.from_file(str(file)), (rows,), (), 0, "").size == file.stat().st_size > 30e6
    everything = read()
    if everything < 10e6:
        pytest.skip("nothing is read ahead here: memory is the disk, or another system")
    assert read(alone=True) < everything / 10


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a file cannot be forgotten here")
def test_rows_that_were_asked_for_are_there(tmp_path: Path) -> None:
    """What is then looked at comes from memory, and little else was read for it; some rows have no tokens at all."""
    rows = 200_000
    lengths = np.arange(rows, dtype=np.int32) % 50
    ids = pa.ListArray.from_arrays(
        np.concatenate([[0], lengths.cumsum(dtype=np.int32)]).astype(np.int32), np.ones(lengths.sum(), dtype=np.int32)
    )
    whole, file = pa.table({"row": np.arange(rows), "input_ids": ids, "length": lengths}), tmp_path / "a.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    chosen = np.concatenate([np.random.default_rng(0).integers(0, rows, 20), [0, 50, rows - 1]])
    _forget(file)
    encoded = Encoded(Dataset.from_file(str(file)), (rows,), (), 0, "", alone=True)
    start = _from_disk()
    for lists in (False, True):
        encoded.ask(chosen, lists=lists)
        time.sleep(1)  # until it was read
    asked = _from_disk()
    same(encoded.features(chosen), arrays(whole.take(chosen)))
    if asked == start:
        pytest.skip("nothing is read from a disk here, or nobody counts it")
    assert _from_disk() - asked < 10 * mmap.PAGESIZE  # of more than 60: the system may have taken one back meanwhile
    assert asked - start < 100 * len(chosen) * mmap.PAGESIZE


def test_neighbours_are_asked_for_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pages: what touches, overlaps or lies within another is told of once."""
    told = list[tuple[int, int, int]]()
    monkeypatch.setattr(advice, "_library", lambda: SimpleNamespace(madvise=lambda *given: told.append(given)))
    page = mmap.PAGESIZE
    first = np.array([9 * page + 5, 5, page - 1, 20 * page, 4 * page, 4 * page + 8])
    last = np.array([9 * page + 9, 9, page + 1, 23 * page + 1, 8 * page, 4 * page + 9])
    advice.soon(first[:0], last[:0])
    assert told == []
    advice.soon(first, last)
    spans = [(address // page, size // page) for address, size, _ in told]
    assert spans == [(0, 2), (4, 4), (9, 1), (20, 4)]
    assert {what for _, _, what in told} == {mmap.MADV_WILLNEED}
    assert all(address % page == size % page == 0 for address, size, _ in told)


def test_a_part_of_a_file_is_told_of_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a column is a list of nothing, which lies nowhere."""
    whole = table_of({"row": [*range(9)], "labels": [[]] * 9, "length": [3] * 9})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    told = list[tuple[int, int, int]]()
    monkeypatch.setattr(advice, "_library", lambda: SimpleNamespace(madvise=lambda *given: told.append(given)))
    dataset = Dataset.from_file(str(tmp_path / "a.arrow"))
    found = Encoded(dataset, (9,), (), 0, "", alone=True).features(np.array([8, 0]))
    same(found, arrays(whole.take([8, 0])))
    ((first, size, what),) = told
    assert first % mmap.PAGESIZE == 0 and 0 < size < 3 * mmap.PAGESIZE and what == mmap.MADV_RANDOM


def _forget(file: Path) -> None:
    gc.collect()  # what is mapped is not forgotten
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _from_disk() -> int:
    """Return the bytes that were read from the disk for this process; 0 where nobody counts them."""
    counts = Path("/proc/self/io")
    lines = counts.read_text().splitlines() if counts.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)
