"""What the starting model says of every example: asked once, before the first update, and kept under `data.cache`."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from numpy.typing import NDArray
from tqdm import tqdm

from data.cache import Notes, kept
from data.encoded import Encoded
from data.order import example_keys
from data.plan import Bounds, MicroBatch, plan_evaluation
from train import signals, together
from train.memory import Fitting
from train.tasks.base import Task
from train.weights import fingerprint_of

if TYPE_CHECKING:
    from accelerate import Accelerator

NAME = "reference"
"""Of the column beside the encoded ones."""

VERSION = 1  # part of the key: raise it when what is kept changes


def referred(
    task: Task,
    model: Any,
    splits: Mapping[str, Encoded],
    accelerator: Accelerator,
    precision: str,
    bounds: Bounds,
    cache: Path,
) -> dict[str, Encoded]:
    """Return the splits with the column `reference`, (n, ...) float64: `Task.reference` of all examples.

    `model` is that model, on its device, before anything was loaded into it or wrapped around it. All processes share
    the work and have the same values, whatever their number: those of no dropout, in the precision of the run. What was
    asked before, of these examples and these weights, is mapped from the cache; that is how a run that goes on has it.
    Raises `Stopped` on all processes once one has been asked to stop.
    """
    start = [_identity(task, model, precision) if accelerator.is_main_process else ""]
    broadcast_object_list(start)
    found: dict[str, Encoded] = {}
    for role, encoded in splits.items():
        key = hashlib.sha256(repr((start[0], encoded.fingerprint)).encode()).hexdigest()[:24]
        target = cache / "references" / f"{key}.npy"
        values = _kept(target, task, model, encoded, accelerator, bounds)
        found[role] = replace(encoded, beside={**encoded.beside, NAME: values})
    return found


def _identity(task: Task, model: Any, precision: str) -> str:
    """Return all that the values depend on beside the examples: weights, the config and kind of the model, precision,
    and the code that asks. `max_length` and the tokenizer are in the examples."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "id2label")}
    module = sys.modules[type(task).__module__]
    helpers = sorted(Path(inspect.getfile(module)).parent.glob("_*.py"))
    code = [inspect.getsource(module), *(file.read_text(encoding="utf-8") for file in helpers)]
    model_kind = (type(model).__qualname__, json.dumps(config, sort_keys=True, default=str), model.device.type)
    return repr((VERSION, fingerprint_of(model), model_kind, precision, code))


def _kept(
    target: Path, task: Task, model: Any, encoded: Encoded, accelerator: Accelerator, bounds: Bounds
) -> NDArray[np.float64]:
    """Return the values in the file `target`, which is made by all processes where one of them has none."""
    there = torch.tensor([float(_read(target) is not None)], device=accelerator.device)
    reduced: Any = accelerator.reduce(there, "sum")
    if reduced.item() < accelerator.num_processes:  # a node may have a cache of its own, and that may be empty
        values = _ask(task, model, encoded, accelerator, bounds)

        def write(writing: Path) -> Notes:
            with writing.open("wb") as stream:
                np.save(stream, values)
            return {"examples": len(values)}

        kept(target, write)
    result = _read(target)
    assert result is not None and len(result) == len(encoded.dataset)
    return result


def _read(target: Path) -> NDArray[np.float64] | None:
    """Map the values in a file; None if it is not there, or not whole."""
    try:
        result: NDArray[np.float64] = np.load(target, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return result


def _ask(task: Task, model: Any, encoded: Encoded, accelerator: Accelerator, bounds: Bounds) -> NDArray[np.float64]:
    """Return the values of all examples, (n, ...), on every process. The cut does not depend on their number."""
    lengths = encoded.computed(padding_free=bounds.padding_free)
    fitting = Fitting("evaluate.batch_tokens", bounds)
    plan = plan_evaluation(lengths, bounds, accelerator.num_processes)

    def ask(part: MicroBatch) -> tuple[Any, Any]:
        features = {**encoded.features(part.rows), "key": example_keys(part.rows, "evaluation")}
        tensors = send_to_device(task.collate(features), accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            return part.rows, task.reference(model, tensors).double().cpu().numpy()

    training = model.training
    model.eval()
    shares: list[tuple[Any, Any]] = []
    quiet = not (accelerator.is_main_process and sys.stderr.isatty())
    for part in tqdm(plan[accelerator.process_index], desc="starting model", disable=quiet, dynamic_ncols=True):
        together.goes_on()
        if signals.stopping():
            break
        if part.filler:  # the model is not wrapped yet: nobody waits for this process
            continue
        shares += fitting(part, lengths, ask)
    model.train(training)
    together.wait()  # shares take as long as they take
    if together.anyone(accelerator, signals.stopping()):
        raise signals.Stopped
    if accelerator.num_processes > 1:
        shares = gather_object(shares)
    ids = np.concatenate([rows for rows, _ in shares])
    order = np.argsort(ids)
    assert np.array_equal(ids[order], np.arange(len(encoded.dataset))), "an example is missing or repeated"
    result: NDArray[np.float64] = np.concatenate([values for _, values in shares])[order]
    return result
