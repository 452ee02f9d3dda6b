"""Everything before training: what a run is made from is read, and it can be broken off without a loss."""

from __future__ import annotations

from dataclasses import replace

from data import pulse
from data.plan import Bounds
from train import signals, together, watch
from train.config import RunConfig
from train.ingredients import Ingredients, cache_folder, read
from train.limits import at_once
from train.reference import referred
from train.signals import Stopped


def prepared(config: RunConfig) -> Ingredients:
    """Read what the run is made from. Raises `Stopped` on all processes if one was asked to stop on the way."""
    found: Ingredients | None = None
    pulse.listen(_goes_on)
    try:
        with together.alive():
            found = read(config)
    except Stopped:
        pass
    finally:
        pulse.listen()
    together.meet(found is None)
    assert found is not None
    watch.beat()  # from here on processes wait for each other
    return _referred(config, found)


def _goes_on(got_on: bool | None) -> None:
    """Take a pulse of the data for a sign of life, and end its work if this process is to stop."""
    if got_on is None:
        watch.rest()  # a model may be downloaded next
        return
    if got_on:
        watch.beat()
    if signals.stopping():
        raise Stopped


def _referred(config: RunConfig, found: Ingredients) -> Ingredients:
    """Return the ingredients with what their model, still the starting one, says of the examples, if that matters."""
    if not config.task.refers:
        return found
    bounds = judging(config, found)
    splits = referred(
        found.task, found.model, found.splits, found.accelerator, found.precision, bounds, cache_folder(config)
    )
    return replace(found, splits=splits)


def judging(config: RunConfig, found: Ingredients) -> Bounds:
    """Return the bounds of micro-batches without gradients."""
    return at_once(config.evaluate.batch_tokens, found.accelerator.device, padding_free=found.padding_free)
