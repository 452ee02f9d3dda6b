"""Sizes that take turns from update to update, within one run: what disturbs a machine for seconds disturbs all alike.

Whole runs of each size, in processes of their own, differ by a quarter from one to the next on a guest machine: medians
of eight do not tell 5 %.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.compare.peers import Over
from benchmarks.growth import rows
from data.batches import Batch, Batches, Position
from data.order import Order

WARM = 5
"""Turns that are made before time is taken."""

DRAWS = 4_000


@dataclass(frozen=True)
class _InTurn(Batches):
    """Batches of several training sets, one after the other; back and forth, so that none always follows another."""

    sets: list[Batches] = field(default_factory=list)

    def between(self, done: int, updates: int, position: Position = None) -> Iterator[tuple[int, Batch]]:
        for update in range(done + 1, updates + 1):
            turn, place = divmod(update - 1, len(self.sets))
            yield update, self.sets[place if turn % 2 == 0 else -1 - place].batch(turn + 1)


def measure(folder: Path, sizes: Sequence[int], turns: int) -> list[str]:
    """Make `turns` updates of each size in one run; return the lines of a table, in Markdown."""
    from train import run, update
    from train.config import validate

    count, begun, ended, tokens = (WARM + turns) * len(sizes), list[float](), list[float](), list[int]()
    real, planned = update.Learner.update, run.plan_batches

    def plan(settings: Any, ingredients: Any) -> Any:
        smallest, bounds = planned(settings, ingredients)
        assert isinstance(smallest, Batches)
        sets = []
        for size in sizes:
            encoded = rows.opened(validate(rows.config(folder, size, folder / "run", 1), "growth"))
            sets.append(replace(smallest, encoded=encoded, order=Order((size,), (size,), rows.BATCH, 0)))
        own = {each.name: getattr(smallest, each.name) for each in fields(Batches)}
        return _InTurn(**own, sets=sets), bounds

    def timed(self: update.Learner, number: int, batch: Any) -> update.Report:
        begun.append(time.perf_counter())
        found = real(self, number, batch)
        ended.append(time.perf_counter())
        tokens.append(batch.tokens)
        if number == count:
            raise Over
        return found

    with (
        tempfile.TemporaryDirectory(dir=folder) as output,
        patch.object(update.Learner, "update", timed),
        patch.object(run, "plan_batches", plan),
        suppress(Over),
    ):
        run.run(validate(rows.config(folder, sizes[0], Path(output) / "run", count), "growth"))
    seconds = np.diff(ended, prepend=np.nan)
    waited = seconds - (np.array(ended) - begun)  # for its batch, which comes between two updates
    each = [sorted_by_size(values, len(sizes))[WARM:] for values in (seconds, waited, np.array(tokens))]
    return _table(sizes, *each)


def sorted_by_size(values: NDArray[Any], sizes: int) -> NDArray[Any]:
    """Return what was seen in each update, (turns x sizes,), as (turns, sizes): every second turn goes backwards."""
    found = values.reshape(-1, sizes).copy()
    found[1::2] = found[1::2, ::-1].copy()
    return found


def _table(sizes: Sequence[int], seconds: NDArray[Any], waited: NDArray[Any], tokens: NDArray[Any]) -> list[str]:
    """(turns, sizes) each: tokens a second, and of the first size's, with an interval by bootstrap of turns."""
    speed = tokens.sum(0) / seconds.sum(0)
    drawn = np.random.default_rng(0).integers(0, len(seconds), (DRAWS, len(seconds)))
    speeds = np.array([tokens[some].sum(0) / seconds[some].sum(0) for some in drawn])
    low, high = np.quantile(speeds / speeds[:, :1], (0.025, 0.975), axis=0)
    spread = np.quantile(speeds.max(1) / speeds.min(1) - 1, 0.975)
    lines = [
        f"| in turn, {len(seconds)} updates of each | tokens/s | of 10^{_power(sizes[0])}'s (95 %) | "
        "tokens an update | waits for its batch |",
        "|---|---|---|---|---|",
    ]
    for place, size in enumerate(sizes):
        part = f"{speed[place] / speed[0]:.3f} ({low[place]:.3f} to {high[place]:.3f})"
        share = waited[:, place].sum() / seconds[:, place].sum()
        told = f"{speed[place]:,.0f} | {part} | {tokens[:, place].mean():.1f} | {share:.2%}"
        lines.append(f"| 10^{_power(size)} | {told} |")
    return [*lines, f"| highest / lowest - 1 | {speed.max() / speed.min() - 1:.1%} (at most {spread:.1%}) | | | |"]


def _power(size: int) -> int:
    return len(str(size)) - 1
