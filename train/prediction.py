"""A trained model answers rows: in parts, by any number of processes, each part once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from pydantic import ValidationError

from data.encode import encode_sources
from data.encoded import Encoded
from data.errors import Unavailable, UserError, nearest
from data.plan import MicroBatch, plan_evaluation
from data.source import Rows, Source, check_columns, open_rows
from train import files, hardware, notes, overrides, plugins, problems, signals, strategy, tasks, together, weights
from train.evaluation import Coming, Found, joined, predictions
from train.last_layer import enable
from train.limits import at_once
from train.memory import Fitting
from train.model import load_model, place
from train.model_config import ModelConfig
from train.parts import Parts, Progress
from train.tasks._generation import Generation
from train.tasks.base import Predictor, Task
from train.tokenizer import ids, load_tokenizer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


@dataclass(frozen=True)
class Request:
    """What is to be answered, by which model, and where the answers go."""

    model: Path
    input: str
    output: Path
    columns: dict[str, str]
    """Name in the training rows → name in these."""
    assignments: Sequence[str]
    precision: str
    batch_tokens: int
    part_rows: int
    skip_bad: bool
    cache: Path


def predict(request: Request) -> bool:
    """Write a line of JSON for each row of the input, in its order; return whether all of it is there.

    The rows are cut into parts of `part_rows`. A part is one process's work, sorted by length, and written whole or not
    at all beside the output, so that neither the number of processes nor a kill on the way changes a byte of the
    result; what is there already is not computed again. Bad rows are an error, or have no line. Raises `UserError`
    before anything is written for a model, rows or options that cannot be used.
    """
    accelerator, precision = hardware.build_accelerator(request.precision)
    strategy.check(accelerator)
    if accelerator.distributed_type.value == "DEEPSPEED":
        raise UserError("accelerate was asked for DEEPSPEED, which is for training only here; use ddp.yaml or torchrun")
    about = _about(request.model)
    tokenizer, model, task = _load(request, about, "fp64" if precision == "fp64" else "fp32")
    try:
        rows = [_renamed(part, request.columns) for part in _open(request)]
        asked = task.asked(model, tokenizer, rows)
        _check_names(request.columns, asked.columns)
        check_columns(rows, asked.columns, "--input (choose columns with --column trained-name=name)")
        encoded = encode_sources(
            [rows], asked, tokenizer, about["max_length"], skip_bad=request.skip_bad, cache=request.cache
        )
    except UserError as error:
        raise _in_our_words(error) from error
    place(model, accelerator.device)
    with accelerator.autocast():
        padding_free = enable(model)
    model = accelerator.prepare_model(model, evaluation_mode=True).eval()
    plan = {
        "model": weights.fingerprint(str(request.model)),
        "rows": encoded.fingerprint,
        "task": task.saved(),
        "precision": precision,
        "batch_tokens": request.batch_tokens,
        "part_rows": request.part_rows,
    }
    parts = Parts(request.output, _cuts(encoded, request.part_rows))
    try:
        _agree(accelerator, lambda: parts.begin(plan))
        bounds = at_once(request.batch_tokens, accelerator.device, padding_free=padding_free)
        room = Fitting("--batch-tokens", bounds)
        progress = Progress(parts, speaks=accelerator.is_main_process)
        for number in range(accelerator.process_index, parts.count, accelerator.num_processes):
            if signals.stopping():
                break
            if not parts.there(number):
                mine = _between(encoded, parts.cuts, number)
                lines = _answers(model, asked, mine, parts.cuts[number], room, accelerator)
                if lines is not None:
                    parts.write(number, lines)
            progress.report()
        together.wait()  # until all parts are written, however long the last one takes
        complete = all(gather_object([parts.complete]))  # all have looked: joining removes them
        if complete:
            _agree(accelerator, lambda: parts.join(encoded.skipped))
    finally:
        parts.end()
    return complete


def _about(folder: Path) -> dict[str, Any]:
    """Return what the run has noted beside its model; raise `UserError` for a folder that no run has exported."""
    about = notes.read(folder)
    if "task" not in about:
        raise UserError(
            f"{folder}: there is no {notes.FILE} that names a task, so it is no model that this program has exported. "
            "Name the output folder of a run that is done, or the folder model in it"
        )
    return about


def _load(request: Request, about: dict[str, Any], precision: str) -> tuple[Any, Any, Task]:
    """Return tokenizer, model and task of an exported model, the options of its task changed as asked."""
    import torch

    settings = ModelConfig(path=str(request.model))
    tokenizer, _ = load_tokenizer(settings, (), request.cache, None)
    plugin = plugins.load(tasks, "task", about["task"])
    task = _changed(plugin.task.restored(about["found"], tokenizer), request.assignments)
    model, new = load_model(
        settings, task.model_class, task.model_config, tokenizer,
        known=ids(tokenizer), dtype=torch.float64 if precision == "fp64" else torch.float32, seed=0, token=None,
    )  # fmt: skip
    if new:
        raise UserError(f"{request.model}: the weights lack {', '.join(new)}; export the model again")
    return tokenizer, model, task


def _changed(task: Task, assignments: Sequence[str]) -> Task:
    """Return the task with `task.key=value` in its config, where they change no more than how it answers."""
    given = overrides.parse(assignments)
    allowed = [f"task.{key}" for key in task.free]
    own = given.pop("task", {})
    wrong = [*given, *(f"task.{key}" for key in own if key not in task.free)] if isinstance(own, dict) else ["task"]
    if wrong:
        there = f"what may be changed is {', '.join(allowed)}" if allowed else "this task has none that may be changed"
        raise UserError(f"{wrong[0]}: no key of a prediction; {there}{nearest(wrong[0], allowed)}")
    if not own:
        return task
    config = cast(Any, task).config
    content = {**config.model_dump(), **own}
    if "generation" in own:
        if not isinstance(own["generation"], dict):
            raise UserError(f"task.generation: give its keys, as in task.generation.beams=4, not {own['generation']!r}")
        content["generation"] = {**(config.generation or Generation()).model_dump(), **own["generation"]}
    try:
        return cast(Task, replace(cast(Any, task), config=type(config).model_validate(content)))
    except ValidationError as error:
        lines = problems.explain(type(config), content, error.errors())
        raise UserError("\n".join(f"task.{line}" for line in lines)) from error


def _open(request: Request) -> list[Rows]:
    source = Source(path=request.input)
    return open_rows(source, "input", skip_bad=request.skip_bad, cache=request.cache, token=os.environ.get("HF_TOKEN"))


def _renamed(rows: Rows, columns: dict[str, str]) -> Rows:
    there, dataset = rows.dataset.column_names, rows.dataset
    for name, own in columns.items():
        if own not in there:
            raise UserError(f"--column {name}={own}: {rows.name} has no column {own!r}; it has {', '.join(there)}")
        dataset = dataset.remove_columns([name]) if name in there and name != own else dataset
        dataset = dataset.rename_column(own, name) if name != own else dataset
    return replace(rows, dataset=dataset)


def _check_names(columns: dict[str, str], read: Sequence[str]) -> None:
    for name, own in columns.items():
        if name not in read:
            raise UserError(
                f"--column {name}={own}: the model reads no column {name!r}, but {', '.join(read)}{nearest(name, read)}"
            )


def _in_our_words(error: UserError) -> UserError:
    """Return an error about rows that names the options of this command, not the keys of a config."""
    said = str(error).replace("data.input", "--input").replace("data.on_bad_row=skip", "--on-bad-row skip")
    return type(error)(said.replace("data.cache", "--cache"))


def _cuts(encoded: Encoded, part_rows: int) -> list[int]:
    """Return where parts begin and the last ends: examples, all those of a row in one part."""
    rows = encoded.column("row")
    starts = np.searchsorted(rows, np.arange(0, int(rows[-1]) + 1, part_rows))
    return [*dict.fromkeys(starts.tolist()), len(rows)]


def _between(encoded: Encoded, cuts: Sequence[int], number: int) -> Encoded:
    first, end = cuts[number], cuts[number + 1]
    return replace(encoded, dataset=encoded.dataset.select(range(first, end)), sizes=(end - first,))


def _answers(
    model: nn.Module,
    asked: Predictor,
    encoded: Encoded,
    first: int,
    room: Fitting,
    accelerator: Accelerator,
) -> str | None:
    """Return the lines of a part; None, if the process was asked to stop on the way."""
    lengths, coming = encoded.computed(padding_free=room.bounds.padding_free), Coming(accelerator.device)

    def find(piece: MicroBatch) -> Found:
        return predictions(model, asked, encoded, piece, accelerator.device, first)

    for micro_batch in plan_evaluation(lengths, room.bounds, 1)[0]:
        coming.add(room(micro_batch, lengths, find))
        if signals.stopping():  # in the middle of a text, perhaps
            return None
    places, arrays = joined(coming.arrived())
    whole = {name: values[np.argsort(places)] for name, values in arrays.items()}
    return files.json_lines(asked.records(whole, encoded))


def _agree(accelerator: Accelerator, act: Any) -> None:
    """Let the main process act, and all learn whether it could: what it raises, all raise."""
    told: list[Any] = [None, False]
    if accelerator.is_main_process:
        try:
            act()
        except (UserError, OSError) as error:
            told = [f"{error}", isinstance(error, Unavailable)]
    broadcast_object_list(told)
    if told[0] is not None:
        raise (Unavailable if told[1] else UserError)(told[0])
