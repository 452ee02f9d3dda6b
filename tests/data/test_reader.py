"""Rows that are read for several updates at once: asked for in time, and once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from data.order import Order
from data.reader import Reader


@dataclass
class Rows:
    """Examples of which it is written down when they are asked for, and when they are read."""

    asked: bool = True
    alone: bool = False
    told: list[tuple[str, list[int]]] = field(default_factory=list)

    def ask(self, ids: Any, *, lists: bool) -> None:
        self.told.append(("lists" if lists else "all else", ids.tolist()))

    def features(self, ids: Any) -> dict[str, Any]:
        self.told.append(("read", ids.tolist()))
        return {"row": ids}


def reader(rows: Rows, size: int = 1000, batch: int = 100) -> Reader:
    order = Order((size,), (size,), batch, 0)
    return Reader(rows, order, order.examples)  # type: ignore[arg-type]


def test_rows_are_asked_for_before_they_are_read() -> None:
    """Two epochs of ten updates, two at once: where their lists lie two reads before, the lists one before."""
    rows = Rows()
    made = reader(rows)
    assert made.encoded.alone and not reader(Rows(asked=False)).encoded.alone
    for update in range(1, 21):
        ids, features = made.read(update)
        assert ids.tolist() == features["row"].tolist() == made.examples(update).tolist()
        assert len(features["key"]) == len(ids)
    reads = [ids for what, ids in rows.told if what == "read"]
    assert len(reads) == 10
    for number, ids in enumerate(reads):
        at = rows.told.index(("read", ids))
        before = [rows.told.index((what, ids)) for what in ("all else", "lists")]
        assert before[0] < before[1] < at
        between = (
            [what for what, _ in rows.told[before[0] : at]].count("read"),
            [what for what, _ in rows.told[before[1] : at]].count("read"),
        )
        assert between == ((0, 0) if number == 0 else (1, 1) if number == 1 else (2, 1))
        assert rows.told.count(("lists", ids)) == rows.told.count(("all else", ids)) == 1


def test_who_begins_elsewhere_asks_anew() -> None:
    rows = Rows()
    made = reader(rows)
    made.read(1)
    rows.told.clear()
    made.read(2)
    assert rows.told == []
    ids = made.read(7)[0].tolist()
    kinds = [what for what, _ in rows.told]
    assert kinds == ["all else", "all else", "lists", "all else", "lists", "read"]
    assert ids == rows.told[0][1][:100] == rows.told[2][1][:100] == rows.told[5][1][:100]


def test_the_end_of_an_epoch_is_not_read_with_the_next() -> None:
    """Three updates of 100, 100 and 50 rows: two at once, then the rest; a batch as large as that, alone."""
    rows = Rows(asked=False)
    made = reader(rows, 250)
    assert [len(made.read(update)[0]) for update in range(1, 7)] == [100, 100, 50] * 2
    assert [(what, len(ids)) for what, ids in rows.told] == [("read", 200), ("read", 50)] * 2
    alone = Rows(asked=False)
    reader(alone, 3000, 1000).read(2)
    assert [(what, len(ids)) for what, ids in alone.told] == [("read", 1000)]


@pytest.mark.parametrize("updates", [[3, 1, 2], [6, 3, 6]])
def test_keys_are_those_of_the_epoch(updates: list[int]) -> None:
    """The same example has another key in another epoch, and the same one whatever was read before."""
    made, fresh = reader(Rows(asked=False), 250), {}
    for update in updates:
        fresh[update] = reader(Rows(asked=False), 250).read(update)
        ids, features = made.read(update)
        assert np.array_equal(features["key"], fresh[update][1]["key"]) and np.array_equal(ids, fresh[update][0])
