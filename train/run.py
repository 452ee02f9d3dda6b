"""Assembly: the one file that knows everybody. Rows → tokens → model → loop → results."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.batches import Batches, Feed
from data.errors import UserError
from data.order import Order, shares
from data.plan import Bounds
from train import (
    adapter,
    compilation,
    few_bytes,
    frozen,
    launches,
    logs,
    metrics,
    output,
    signals,
    strategy,
    together,
    watch,
    zero,
)
from train.announcement import announce
from train.checkpoint import Checkpoints
from train.config import RunConfig
from train.coupling import coupled, unchanged
from train.durations import in_updates, total_updates
from train.evaluation import Evaluator
from train.finish import finish
from train.ingredients import Ingredients
from train.journal import Journal
from train.layers import depths, unused
from train.learned import Learned
from train.loop import Every, fit
from train.memory import Memory
from train.optim import build_optimizer, rate, scales
from train.prefetch import prefetch
from train.preparation import judging, prepared
from train.rehearsal import compile_now, first_loss, nothing, settle_memory
from train.signals import Stopped
from train.streams import stream_batches
from train.tracking import Tracker
from train.update import Learner

log = logging.getLogger("train")

MICRO_BATCH_TOKENS = 16_384


def run(config: RunConfig, *, resume_anyway: bool = False) -> int:
    """Carry out a run, or what is left of it; return the exit code of the process.

    0: finished, or stopped on request with a checkpoint. 1: the last checkpoint could not be written.
    Raises `UserError` before anything is written if config, data or model cannot be used. The caller has claimed the
    output folder.
    """
    folder = Path(config.output)
    signals.obey(folder / output.STOP)
    watch.begin(config.distributed.timeout)
    if (folder / output.CONFIG).exists():
        logs.begin(folder)
    try:
        with ExitStack() as held:
            code = _carry_out(config, prepared(config), held, resume_anyway=resume_anyway)
        watch.rest()  # another process may have much to write
        return code
    except Stopped:
        if os.environ.get("RANK", "0") == "0":
            print("stopped before training; nothing is lost, and the same command goes on", flush=True)
            signals.honoured()
        return 0
    except BaseException as error:
        logs.trace(error)
        raise
    finally:
        logs.end()


def _carry_out(config: RunConfig, ingredients: Ingredients, held: ExitStack, *, resume_anyway: bool) -> int:
    """Train, from the newest checkpoint on; return the exit code. `held` lets go of the folder at the end."""
    accelerator = ingredients.accelerator
    batches, bounds = plan_batches(config, ingredients)
    per_epoch = batches.updates_per_epoch
    updates = total_updates(config.epochs, config.updates, per_epoch)
    learner = _learner(config, ingredients, batches, updates)
    evaluators = _evaluators(config, ingredients, learner.model, bounds)
    checkpoints = _checkpoints(config, learner)
    accelerator.wait_for_everyone()  # from here on something is written, since nothing can be refused any more
    if accelerator.is_main_process:
        held.callback(output.begin(config).release)
    held.push(checkpoints.leave)
    validation = ingredients.splits["validation"].fingerprint if "validation" in ingredients.splits else ""
    _resume(config, checkpoints, batches.fingerprint, validation, anyway=resume_anyway)
    known = config.dump()
    if accelerator.is_main_process:
        known["launch"] = launches.record(Path(config.output), checkpoints.state.update, accelerator.num_processes)
    tracker = Tracker(accelerator, Path(config.output), config.tracking, known, checkpoints.state.update)
    journal = Journal(
        tracker, learner, Path(config.output), checkpoints.state,
        updates=updates, speaks=accelerator.is_main_process,
    )  # fmt: skip
    announce(config, ingredients, batches, updates, journal)

    def evaluate(number: int) -> bool:
        journal.settle()
        try:
            figures = evaluators["validation"](number)
        except Stopped:
            return False
        journal.evaluated(number, figures)
        checkpoints.judge(number, figures)
        return True

    every = Every(
        log=max(1, in_updates(config.tracking.log_every, per_epoch, updates)),
        evaluate=max(1, in_updates(config.evaluate.every, per_epoch, updates)) if "validation" in evaluators else 0,
        save=max(1, in_updates(config.checkpoint.every, per_epoch, updates)),
    )
    complete, written = False, True
    try:
        ahead = batches.between(checkpoints.state.update, updates, checkpoints.state.position)
        ahead = prefetch(batches, ahead, accelerator.device)
        if not fit(learner, ahead, evaluate, journal, checkpoints, updates=updates, every=every):
            raise Stopped
        journal.close()
        with together.alive():  # the first has much to write
            written = finish(config, ingredients, learner, evaluators, checkpoints, journal, batches.examples_until)
        complete = True
    except Stopped:
        journal.close()
        journal.say(f"stopped after update {checkpoints.state.update}; the same command goes on {checkpoints.ahead()}")
    finally:
        journal.close()
        tracker.finish(complete=complete)
    signals.honoured()
    return 0 if written and not checkpoints.failed else 1


def _resume(config: RunConfig, checkpoints: Checkpoints, train: str, validation: str, *, anyway: bool) -> None:
    """Go back to the newest checkpoint, if there is one, and see that this is still the run that wrote it."""
    newest = checkpoints.newest()
    logs.begin(Path(config.output))  # all know that the first process has made the folder a run's
    if newest is not None:
        checkpoints.load(newest)
    checkpoints.check_data(train, validation, anyway=anyway)
    checkpoints.check_start(config.model.path, config.model.revision, anyway=anyway)


def plan_batches(config: RunConfig, ingredients: Ingredients) -> tuple[Feed, Bounds]:
    """Return the batches of the run, and the bounds of an evaluation's micro-batches."""
    accelerator, train = ingredients.accelerator, ingredients.splits["train"]
    bounds = judging(config, ingredients)
    tokens = config.micro_batch_tokens or (None if config.micro_batch_size else MICRO_BATCH_TOKENS)
    weights = [None if ingredients.streams else source.weight for source in config.data.train]
    per_source = shares(list(train.sizes), weights)
    if not all(per_source):
        raise UserError(
            f"data.train: the weight of {config.data.train[per_source.index(0)].path} is so small that an epoch takes "
            "no row of it; raise it, or leave the source out"
        )
    if min(config.batch_size, sum(per_source)) < ingredients.task.least:
        raise UserError(
            f"batch_size: one example an update teaches nothing here ({ingredients.task}): there is no other to tell "
            f"it from. Give {ingredients.task.least} or more, and as many rows, or columns of hard negatives"
        )
    order = Order(train.sizes, per_source, config.batch_size, config.seed)
    batches = Batches(
        train,
        order,
        replace(bounds, rows=config.micro_batch_size, tokens=tokens),
        ingredients.task.collate,
        ingredients.task.count,
        accelerator.num_processes,
        accelerator.process_index,
        window=config.data.window if config.data.grouping == "window" else None,
    )
    if ingredients.streams:
        return stream_batches(ingredients.streams, config.data, config.batch_size, batches), bounds
    return batches, bounds


def _learner(config: RunConfig, ingredients: Ingredients, batches: Feed, updates: int) -> Learner:
    """Return the model and optimizer, prepared by Accelerate, with the rule by which they learn."""
    settings, accelerator, task = config.optim, ingredients.accelerator, ingredients.task
    per_epoch = batches.updates_per_epoch
    warmup, decay = (in_updates(value, per_epoch, updates) for value in (settings.warmup, settings.decay))
    unfreeze = max(1, in_updates(settings.unfreeze, per_epoch, updates)) if settings.unfreeze is not None else 0
    found: dict[str, int] = {}
    if settings.by_layer:
        new = adapter.renamed(ingredients.model, ingredients.new_parameters)
        found = depths(ingredients.model, first_loss(ingredients, batches), new)
    if settings.few_bytes:
        few_bytes.settle(ingredients.model, settings.parameters, ingredients.precision)
    built = build_optimizer(ingredients.model, settings, found, config.seed)
    scale = scales(settings, built, unfreeze, updates)
    if strategy.copies(accelerator):
        missing = len(unused(ingredients.model, first_loss(ingredients, batches)))
        total = accelerator.reduce(torch.tensor(missing, device=accelerator.device), "sum")
        # DDP would wait for gradients that never come; all processes must look for them, or none
        accelerator.ddp_handler.find_unused_parameters = bool(total.item())
    if accelerator.distributed_type.value == "DEEPSPEED":
        zero.check_used(unused(ingredients.model, first_loss(ingredients, batches)))
    if config.adapter:
        forward = first_loss(ingredients, batches)
        frozen.hold(ingredients.model, forward, accelerator, ingredients.precision, merges=config.adapter.merge)
    settle_memory(config.activation_checkpointing, ingredients, built, batches)
    if config.compile:
        compilation.compile_layers(ingredients.model)
    spread = strategy.prepare(accelerator, ingredients.model, built, ingredients.precision, settings.max_grad_norm)
    spread.model.train()
    with compilation.eager():  # a single row would be compiled for itself; and what computes twice must do alike
        spread.settle(nothing(spread.model, ingredients, batches))
    if config.compile:
        compile_now(spread, ingredients, batches)
    return Learner(
        spread,
        task.loss,
        rate(settings, updates, warmup, decay),
        scale,
        seed=config.seed,
        max_grad_norm=settings.max_grad_norm,
        # fp16 finds its loss scale by overflowing a few times: that is no failure
        max_nonfinite=settings.max_nonfinite + (20 if accelerator.scaler is not None else 0),
        stopping=signals.stopping,
        anticipate=partial(coupled, task, accelerator) if task.couples else unchanged,
        memory=Memory(accelerator, batches.cuts, Path(config.output)),
    )


def _evaluators(config: RunConfig, ingredients: Ingredients, model: Any, bounds: Bounds) -> dict[str, Evaluator]:
    chosen = [metrics.parse(entry) for entry in config.metrics or ingredients.task.default_metrics]
    evaluators: dict[str, Evaluator] = {}
    for role in ("validation", "test"):
        if encoded := ingredients.splits.get(role):
            first = evaluators.get("validation")
            evaluators[role] = Evaluator(
                role, ingredients.accelerator, model, ingredients.task, encoded, bounds, chosen, first
            )
    return evaluators


def _checkpoints(config: RunConfig, learner: Learner) -> Checkpoints:
    settings = config.checkpoint
    best = settings.best and f"validation/{settings.best.removeprefix('validation/')}"
    higher = settings.best_is == "highest" or (settings.best_is == "auto" and metrics.higher_is_better(best or ""))
    accelerator, folder = learner.accelerator, Path(config.output) / "checkpoints"
    learned = Learned(learner.strategy, only_what_learns=config.adapter is not None)
    return Checkpoints(
        folder, accelerator, learned, keep=settings.keep, best=best, higher_is_better=higher,
        patience=settings.patience, in_background=settings.background,
    )  # fmt: skip
