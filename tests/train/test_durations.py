from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from train.durations import Duration, Interval, in_updates, total_updates

DURATION: TypeAdapter[int | str] = TypeAdapter(Duration)
INTERVAL: TypeAdapter[int | str] = TypeAdapter(Interval)


@pytest.mark.parametrize(
    "text, updates",
    [
        (500, 500),
        ("500", 500),
        ("500 updates", 500),
        ("1 update", 1),
        ("2 epochs", 200),
        ("1epoch", 100),
        ("0.5 epochs", 50),
        ("0.25 epochs", 25),
        ("10%", 30),
        ("6 %", 18),
        ("0.5%", 2),  # 1.5, half to even
        ("0.1%", 0),
        ("100%", 300),
        (0, 0),
    ],
)
def test_in_updates(text: int | str, updates: int) -> None:
    assert in_updates(DURATION.validate_python(text), updates_per_epoch=100, updates=300) == updates


@pytest.mark.parametrize("value", [-1, "-1", 0.5, True, None, [1], "soon", "1.5", "epochs", "101%", "1 epoch 2", "1e3"])
def test_what_is_no_duration(value: Any) -> None:
    for adapter in (DURATION, INTERVAL):
        with pytest.raises(ValidationError, match="a duration is a whole number of updates"):
            adapter.validate_python(value)


@pytest.mark.parametrize("value", [0, "0", "0 epochs", "0%", "0.0%"])
def test_an_interval_is_more_than_nothing(value: Any) -> None:
    with pytest.raises(ValidationError, match="more than nothing"):
        INTERVAL.validate_python(value)


def test_total_updates() -> None:
    assert total_updates(None, 7, 100) == 7
    assert total_updates(2, None, 100) == 200
    assert total_updates(0.333, None, 100) == 34
    assert total_updates(0.1 * 3, None, 10) == 3  # 3.0000000000000004 updates are three
    assert total_updates(0.0001, None, 10) == 1
