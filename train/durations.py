"""Durations as people write them: updates, epochs or a percentage of the run."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(updates?|epochs?|%)\s*")


def _check(value: Any) -> int | str:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = PATTERN.fullmatch(value) if isinstance(value, str) else None
    if match and (match[2] != "%" or float(match[1]) <= 100):
        return str(value)
    raise ValueError(f"a duration is a whole number of updates (500), '2 epochs', or '10%' of the run, not {value!r}")


def _not_nothing(value: int | str) -> int | str:
    if in_updates(value, 10**9, 10**9) == 0:
        raise ValueError(f"an interval must be more than nothing, not {value!r}")
    return value


_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*(updates?|epochs?|%)\s*$"},
    ]
}

Duration = Annotated[int | str, BeforeValidator(_check), WithJsonSchema(_SCHEMA)]
"""500, "500 updates", "0.5 epochs" or "10%"."""

Interval = Annotated[int | str, BeforeValidator(_check), AfterValidator(_not_nothing), WithJsonSchema(_SCHEMA)]
"""A duration after which something happens again: more than nothing."""


_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(seconds?|minutes?|hours?)\s*")


def _seconds(value: Any) -> float:
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match:
        value = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2][0]]
    elif isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 10**8:
        return float(value)
    raise ValueError(f"a time is a number of seconds (600), '90 seconds', '10 minutes' or '2 hours', not {value!r}")


_TIME_SCHEMA = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*(seconds?|minutes?|hours?)?\s*$"},
    ]
}

Seconds = Annotated[float, BeforeValidator(_seconds), WithJsonSchema(_TIME_SCHEMA)]
"""600, "90 seconds", "10 minutes" or "2 hours"; as seconds."""


def in_updates(duration: int | str, updates_per_epoch: int, updates: int) -> int:
    """Return a duration as a number of updates; parts of an update are rounded, half to even."""
    if isinstance(duration, int):
        return duration
    match = PATTERN.fullmatch(duration)
    assert match is not None
    amount = float(match[1])
    scale = {"u": 1.0, "e": updates_per_epoch, "%": updates / 100}[match[2][0]]
    return round(amount * scale)


def total_updates(epochs: float | None, updates: int | None, updates_per_epoch: int) -> int:
    """Return the updates of the whole run; a part of an epoch is rounded up to a whole update."""
    if updates is not None:
        return updates
    assert epochs is not None
    return max(1, math.ceil(epochs * updates_per_epoch - 1e-9))
