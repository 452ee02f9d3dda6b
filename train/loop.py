"""The loop."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from data.batches import Batch
from train import garbage
from train.checkpoint import Checkpoints
from train.journal import Journal
from train.update import Learner


@dataclass(frozen=True)
class Every:
    """Intervals in updates; 0 is never."""

    log: int
    evaluate: int
    save: int


@garbage.only_when_told()
def fit(
    learner: Learner,
    batches: Iterable[tuple[int, Batch]],
    evaluate: Callable[[int], bool],
    journal: Journal,
    checkpoints: Checkpoints,
    *,
    updates: int,
    every: Every,
) -> bool:
    """Train until `updates` have been made in all; log, evaluate and save on the way.

    `batches` begin where the last checkpoint stopped. A request to stop, on any process, is honoured after the update
    or micro-batch of an evaluation at hand, with a checkpoint; an evaluation that it leaves out is made up for when the
    run goes on. Return whether the run is over, and not only stopped.
    """
    evaluate = garbage.by_itself()(evaluate)  # which may take long
    done = checkpoints.state.update
    stop = False
    if is_time(every.evaluate, done, done == updates) and checkpoints.state.evaluated < done:
        stop = not evaluate(done)
    if stop or checkpoints.out_of_patience():
        return not stop
    for number, batch in batches:
        report = learner.update(number, batch)
        journal.count(number, batch)
        last, stop = number == updates, report.stop
        if is_time(every.log, number, last):
            journal.log(number, report)
        if is_time(every.evaluate, number, last) and not stop:
            stop = not evaluate(number)
        over = last or stop or checkpoints.out_of_patience()
        if is_time(every.save, number, over) or checkpoints.is_best(number):
            journal.settle()
            checkpoints.save(number)
        if over:
            break
        if is_time(garbage.EVERY, number, last):
            gc.collect()
    checkpoints.settle()
    return not stop


def is_time(interval: int, number: int, last: bool) -> bool:
    """Whether something that happens every `interval` updates, and at the end, happens after update `number`."""
    return interval > 0 and number > 0 and (last or number % interval == 0)
