"""Tables as they are written: in chunks of some size."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from data import tables


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
