"""What a batch takes does not grow with the training set: neither memory nor what is looked at."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch  # noqa: F401  # not while allocations are traced
from datasets import Dataset

from data.batches import Batches
from data.collate import pad
from data.encoded import Encoded
from data.order import Order
from data.plan import Bounds
from data.reader import TOGETHER
from data.tables import grouped

ROWS = (10**4, 10**6)


def _file(folder: Path, rows: int) -> Path:
    """Return a file of encoded examples of 3 to 29 tokens, in chunks as they are written."""
    generator, file = np.random.default_rng(0), folder / f"{rows}.arrow"
    lengths = generator.integers(3, 30, rows, dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(offsets, np.ones(offsets[-1], dtype=np.int32))
    ones = np.ones(rows, dtype=np.int32)
    whole = pa.table({"row": np.arange(rows), "input_ids": ids, "length": lengths, "targets": ones})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
        for table in grouped(whole.slice(start, 1000) for start in range(0, rows, 1000)):
            writer.write_table(table)
    return file


def _feed(file: Path, rows: int) -> Batches:
    encoded = Encoded(Dataset.from_file(str(file)), (rows,), (), 0, "")

    def collate(features: Any) -> dict[str, Any]:
        return {"input_ids": pad(features["input_ids"], 0)}

    return Batches(
        encoded,
        Order((rows,), (rows,), 32, 0),
        Bounds(tokens=16_384),
        collate,
        lambda found: int(found["targets"].sum()),
    )


def _taken(file: Path, rows: int) -> tuple[int, int]:
    """Return the bytes that the process and Arrow have allocated at most: to open the file, for the first batches, for
    some from late in the epoch and over its end, and for the padding efficiency."""
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        feed = _feed(file, rows)
        for start in (0, int(0.9 * feed.updates_per_epoch), feed.updates_per_epoch - 2):
            assert sum(len(batch.examples) for _, batch in feed.between(start, start + 4)) >= 3 * 32
        assert 0.5 < feed.padding_efficiency(sample=20) <= 1
        return tracemalloc.get_traced_memory()[1], pa.total_allocated_bytes() - before
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """A hundred times as many rows: at most 5 % more, and less than a byte for every second row."""
    files = {rows: _file(tmp_path, rows) for rows in ROWS}
    _taken(files[ROWS[0]], ROWS[0])  # what is imported and made once
    (small, arrow), (large, more) = (_taken(file, rows) for rows, file in files.items())
    assert large <= 1.05 * small and large < ROWS[1] / 2
    assert arrow == more == 0  # all of it is mapped


def test_a_batch_looks_at_a_few_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: its own and its neighbours'; no column as a whole, and no other chunk."""
    for rows in ROWS:
        feed = _feed(_file(tmp_path, rows), rows)
        monkeypatch.setattr(Encoded, "column", lambda *_: pytest.fail("a whole column was read"))
        asked: list[Any] = []
        real = type(feed.encoded._columns).take

        def counted(columns: Any, ids: Any, only: Any = None, real: Any = real, asked: list[Any] = asked) -> Any:
            asked.append(ids)
            return real(columns, ids, only)

        with monkeypatch.context() as patched:
            patched.setattr(type(feed.encoded._columns), "take", counted)
            taken = [feed.batch(update).examples for update in (3, 4)]
        (ids,) = asked
        assert len(ids) == TOGETHER and np.isin(np.concatenate(taken), ids).all()
        columns = feed.encoded._columns
        chunks = set(columns._ends.searchsorted(ids, side="right").tolist())
        assert set(np.flatnonzero(columns._seen).tolist()) == chunks
