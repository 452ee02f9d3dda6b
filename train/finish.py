"""The end of a run: the model that is exported is judged, and everything that others rely on is written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train import files, launches, notes, output, report, watch
from train.adapter_files import finished
from train.checkpoint import Checkpoints
from train.config import RunConfig
from train.evaluation import Evaluator
from train.ingredients import Ingredients
from train.journal import Journal, clock
from train.model import export
from train.update import Learner

log = logging.getLogger("train")


def finish(
    config: RunConfig,
    ingredients: Ingredients,
    learner: Learner,
    evaluators: dict[str, Evaluator],
    checkpoints: Checkpoints,
    journal: Journal,
    examples_until: Callable[[int], int],
) -> bool:
    """Judge the model to be exported (the best, or the last), and write everything that others rely on.

    Returns whether it could be written. Raises `Stopped` on all processes if one is asked to stop while it is judged.
    """
    accelerator, state, folder = ingredients.accelerator, checkpoints.state, Path(config.output)
    exported = state.update
    if checkpoints.best and state.best_update not in (0, state.update) and checkpoints.has_best():
        exported = state.best_update
        checkpoints.load_weights(exported)
    figures: dict[str, float] = {}
    for evaluator in evaluators.values():
        figures.update(evaluator.figures if evaluator.judged == exported else evaluator(exported))
    weights = checkpoints.learned.whole(folder / ".whole")
    if not accelerator.is_main_process:
        return True
    watch.rest()  # nobody waits for what is written now
    own_code = ingredients.model._auto_class is not None
    card = report.card(
        config, figures, ingredients.task, updates=exported, own_code=own_code, new=ingredients.new_parameters
    )
    result = report.results(
        figures,
        state,
        path=config.model.path, precision=ingredients.precision, world=accelerator.num_processes,
        examples=examples_until(state.update), restarts=max(0, launches.starts(folder) - 1),
    )  # fmt: skip
    try:
        for role, evaluator in evaluators.items():
            files.write_json_lines(folder / "predictions" / f"{role}.jsonl", evaluator.records())
        net: Any = learner.strategy.net
        if config.adapter:
            net, weights = finished(net, weights, config.adapter, state.started_from)
        learned = first.task if (first := evaluators.get("validation")) else ingredients.task

        def beside(written: Path) -> None:
            notes.note(written, task=config.task.name, found=learned.saved(), max_length=ingredients.max_length)
            learned.accompany(ingredients.model, ingredients.max_length, written)

        export(net, ingredients.tokenizer, folder / output.MODEL, card, weights, beside)
        files.write_json(folder / output.RESULT, result)
        if not checkpoints.failed:
            files.write(folder / output.DONE, "")
    except Exception as error:  # disk full, no permission: several libraries, several kinds
        log.error("the results could not be written (%s). Free space, and run the same command again", error)
        return False
    _say_how_it_ended(checkpoints, journal)
    if figures:
        journal.say("  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    journal.say(f"trained {state.update:,} updates in {clock(state.seconds)}; results in {folder}")
    journal.tracker.summary(figures)
    return True


def _say_how_it_ended(checkpoints: Checkpoints, journal: Journal) -> None:
    """Where it ended before its time, and where what was asked for as the best never came."""
    state = checkpoints.state
    if checkpoints.best and not state.best_update:
        log.warning("checkpoint.best: no evaluation gave a number for %s; the last model is exported", checkpoints.best)
    if state.update < journal.updates:
        journal.say(f"stopped early (checkpoint.patience): {state.waited} evaluations in a row were no better")
