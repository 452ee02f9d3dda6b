"""Durations as people write them: updates, epochs or a percentage of the run."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import AfterValidator

PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(updates?|epochs?|%)\s*")


def _check(value: int | str) -> int | str:
    if isinstance(value, str) and not PATTERN.fullmatch(value):
        raise ValueError("a duration is a number of updates (500), '2 epochs', or '10%' of the run")
    if isinstance(value, int) and value < 0:
        raise ValueError("a duration cannot be negative")
    return value


Duration = Annotated[int | str, AfterValidator(_check)]
"""500, "500 updates", "0.5 epochs" or "10%"."""


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
