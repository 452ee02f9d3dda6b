"""One measurement, in a process of its own: `python -m benchmarks.growth.worker KIND FOLDER ROWS COUNT`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare.peers import Over
from benchmarks.growth import rows

WARM = 5
"""Updates that are made before time is taken."""


def memory() -> dict[str, float]:
    """Return what is the process's own, and what it has mapped of files that are kept in memory anyway, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    known = dict(line.split(":", 1) for line in lines)
    return {name: int(known[key].split()[0]) / 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def measure_input(folder: Path, count: int, batches: int) -> dict[str, float]:
    """Open the rows, take the first batch, one from late in the epoch, and then many: without a model."""
    import torch

    from data.batches import Batches
    from data.order import Order
    from train.config import validate
    from train.limits import at_once
    from train.run import MICRO_BATCH_TOKENS

    torch.zeros(1)
    settings = validate(rows.config(folder, count, folder / "run", 1), "growth")
    bounds = at_once(MICRO_BATCH_TOKENS, torch.device("cpu"), padding_free=True)
    found: dict[str, float] = {}

    def fresh(name: str, update: int) -> Any:
        begun = time.perf_counter()
        encoded = rows.opened(settings)
        found[f"open_{name}"] = time.perf_counter() - begun
        order = Order(encoded.sizes, encoded.sizes, rows.BATCH, int(time.time()))  # pages that nobody has read yet
        feed = Batches(encoded, order, bounds, _collate, lambda features: int(features["targets"].sum()))
        begun = time.perf_counter()
        next(iter(feed.between(update, update + 1)))
        found[f"first_{name}"] = time.perf_counter() - begun
        return feed

    updates = -(-count // rows.BATCH)
    late = int(updates * np.random.default_rng().uniform(0.8, 0.95))
    fresh("late", late)
    feed = fresh("start", 0)
    found["own_before"] = memory()["own"]
    begun, used, tokens = time.perf_counter(), time.process_time(), 0
    for _, batch in feed.between(late, late + batches):
        tokens += batch.tokens
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    told = {"samples": batches * rows.BATCH / seconds, "tokens": tokens / seconds, "tokens_cpu": tokens / used}
    return {**found, **told, **memory()}


def _collate(features: Any) -> dict[str, Any]:
    """As text classification does."""
    from benchmarks.input import collate

    return collate(features)


def measure_training(folder: Path, count: int, updates: int) -> dict[str, float]:
    """Carry out a whole run up to its last update, as `python -m train` does."""
    from train import run, update
    from train.config import validate

    begun, ends, used, tokens, peak = [], [], [], [], [0.0, 0.0]
    real = update.Learner.update

    def timed(self: update.Learner, number: int, batch: Any) -> update.Report:
        begun.append(time.perf_counter())
        found = real(self, number, batch)
        ends.append(time.perf_counter())
        used.append(time.process_time())
        tokens.append(batch.tokens)
        peak[:] = (max(pair) for pair in zip(peak, memory().values(), strict=True))
        if number == updates:
            raise Over
        return found

    update.Learner.update = timed  # type: ignore[method-assign]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=rows.folder_of(folder, count)) as output, suppress(Over):
        run.run(validate(rows.config(folder, count, Path(output) / "run", updates), "growth"))
    seconds, learned = ends[-1] - ends[WARM - 1], sum(tokens[WARM:])
    waited = sum(begin - end for begin, end in zip(begun[WARM:], ends[WARM - 1 :], strict=False))
    return {
        "first_update": ends[0] - start,
        "tokens": learned / seconds,
        "tokens_cpu": learned / (used[-1] - used[WARM - 1]),
        "samples": rows.BATCH * (updates - WARM) / seconds,
        "input_share": waited / seconds,
        "own": peak[0],
        "mapped": peak[1],
    }


def main() -> None:
    """Print the figures as JSON; of several processes the first does."""
    kind, folder, count, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = (measure_input if kind == "input" else measure_training)(folder, count, size)
    if os.environ.get("RANK", "0") == "0":
        print("FIGURES " + json.dumps(found), flush=True)
    from train import signals

    signals.leave(0)


if __name__ == "__main__":
    main()
