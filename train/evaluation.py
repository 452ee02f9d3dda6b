"""Every example exactly once, on any number of processes, and the same figures on all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from numpy.typing import NDArray

from data.encoded import Encoded
from data.order import example_keys
from data.plan import Bounds, MicroBatch, plan_evaluation
from train import metrics, signals, together, watch
from train.memory import Fitting
from train.prefetch import sent
from train.strategy import copies
from train.tasks.base import Arrays, Predictor, Task

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

ON_THE_WAY = 2**26
"""Bytes of predictions that may be on their way from a GPU: their memory is pinned."""

Found = tuple[NDArray[np.int64], Arrays]
"""Ids of examples, (n,), and what was found of them, (n, ...) each."""


@dataclass
class Evaluator:
    """Judges a model on one set of examples. `role` begins the names of its figures: "validation/accuracy"."""

    role: str
    accelerator: Accelerator
    model: nn.Module
    task: Task
    encoded: Encoded
    bounds: Bounds
    choices: list[metrics.Choice]
    tuned_on: Evaluator | None = None
    """The evaluator of the validation rows, where this one judges with what was chosen there: it must go first."""
    figures: dict[str, float] = field(default_factory=dict)
    """The figures of the last evaluation."""
    judged: int = -1
    """The update that it judged."""
    found: Arrays = field(default_factory=dict)
    """The predictions of the last evaluation, by example id; on the main process only."""

    def __call__(self, update: int) -> dict[str, float]:
        """Return the figures of the model after `update` updates, the same on all processes.

        The micro-batches, and so the predictions, do not depend on how many processes share them. Raises `Stopped` on
        all processes, after the same micro-batch, once one has been asked to stop.
        """
        training = self.model.training
        self.model.eval()
        try:
            coming = Coming(self.accelerator.device)
            for part in self._parts:
                coming.add(self._found(part))
            shares = [joined(coming.arrived())]
        finally:
            self.model.train(training)
        if self.accelerator.num_processes > 1:
            shares = gather_object(shares)
        figures: list[dict[str, float]] = [self._judge(shares) if self.accelerator.is_main_process else {}]
        broadcast_object_list(figures)
        self.figures, self.judged = figures[0], update
        return self.figures

    def _found(self, part: MicroBatch) -> list[Found]:
        """Return what is found of one micro-batch; in several if the memory does not hold it."""

        def find(piece: MicroBatch) -> Found:
            return predictions(self.model, self.task, self.encoded, piece, self.accelerator.device)

        found = self._fitting(part, self._lengths, find)
        watch.beat()
        if together.anyone(self.accelerator, signals.stopping()):
            raise signals.Stopped
        return found

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the last evaluation's predictions in the order of the rows, each with its `row` (from 0)."""
        yield from self._tuned.records(self.found, self.encoded)

    @property
    def _tuned(self) -> Task:
        return self.tuned_on.task if self.tuned_on else self.task

    @cached_property
    def _metrics(self) -> list[Any]:
        """Loaded when first needed: importing `evaluate` takes seconds."""
        return [metrics.load(choice) for choice in self.choices]

    @cached_property
    def _fitting(self) -> Fitting:
        alone = self.accelerator.num_processes == 1 or copies(self.accelerator)
        return Fitting("evaluate.batch_tokens", self.bounds, whole=alone)

    @cached_property
    def _lengths(self) -> NDArray[Any]:
        return self.encoded.computed(padding_free=self.bounds.padding_free)

    @cached_property
    def _parts(self) -> list[MicroBatch]:
        plan = plan_evaluation(self._lengths, self.bounds, self.accelerator.num_processes)
        return plan[self.accelerator.process_index]

    def _judge(self, shares: list[tuple[Any, Arrays]]) -> dict[str, float]:
        shares = [share for share in shares if len(share[0])]
        ids = np.concatenate([share[0] for share in shares])
        order = np.argsort(ids)
        assert np.array_equal(ids[order], np.arange(len(self.encoded.dataset))), "an example is missing or repeated"
        found = {name: stacked([share[1][name] for share in shares])[order] for name in shares[0][1]}
        self.found = self.task.completed(found)
        counted = self.found.get("targets", self.encoded.column("targets"))
        targets = max(1, int(counted.sum()))  # none where the tokenizer leaves nothing of any word
        figures = {"loss": float(self.found["loss"].sum(dtype=np.float64)) / targets}
        if self.role == "validation":
            self.task = self.task.tuned(self.found, self.encoded)
        outputs = self._tuned.outputs(self.found, self.encoded)
        figures.update(metrics.compute(self._metrics, outputs, self.task.kind))
        return {f"{self.role}/{name}": value for name, value in figures.items()}


def predictions(
    model: nn.Module,
    task: Predictor,
    encoded: Encoded,
    part: MicroBatch,
    device: torch.device,
    first: int = 0,
) -> Found:
    """Return the ids of the examples in `part` and what `task` finds of them, in that order; of a filler nothing.

    `first` is what comes before `encoded` where it is a part of something: example ids, from which all that is random
    about an example is drawn, count from there. The model is in evaluation mode. The arrays may be on their way from
    the device: see `Coming`.
    """
    features = {**encoded.features(part.rows), "key": example_keys(part.rows + first, "evaluation")}
    given = task.collate(features)
    tensors = sent(given, device) if device.type == "cuda" else send_to_device(given, device)
    with torch.no_grad():
        predicted = task.predict(model, tensors)
    if part.filler:
        return np.zeros(0, dtype=np.int64), {}
    return part.rows, {name: _array(tensor) for name, tensor in predicted.items()}


class Coming:
    """What is found of one micro-batch after the other, on its way from the device.

    A GPU is not waited for after each, so that it has the next to compute while the one before is being fetched; only
    at the end, and whenever `ON_THE_WAY` bytes are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._here: list[Found] = []
        self._coming: list[Found] = []
        self._bytes = 0

    def add(self, found: Sequence[Found]) -> None:
        """Take what `predictions` has returned."""
        self._coming += found
        self._bytes += sum(array.nbytes for _, arrays in found for array in arrays.values())
        if self._bytes >= ON_THE_WAY:
            self.arrived()

    def arrived(self) -> list[Found]:
        """Wait for all that was added, and return it in that order."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        for ids, arrays in self._coming:
            self._here.append((ids, {name: array.copy() for name, array in arrays.items()}))
        self._coming, self._bytes = [], 0
        return self._here


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """Return what a model gave as numpy knows it: half precision, of which it has one kind only, in fp32.

    From a GPU of NVIDIA it is copied to pinned memory, and may not be there yet. Other devices are waited for.
    """
    half = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    found: NDArray[Any] = (
        (tensor.float() if half else tensor).to("cpu", non_blocking=tensor.device.type == "cuda").numpy()
    )
    return found


def joined(parts: list[Found]) -> Found:
    """Return what was found of several micro-batches as one, in that order; fillers have found nothing."""
    parts = [part for part in parts if len(part[0])]
    if not parts:  # fewer micro-batches than processes
        return np.zeros(0, dtype=np.int64), {}
    names = parts[0][1]
    return np.concatenate([ids for ids, _ in parts]), {
        name: stacked([arrays[name] for _, arrays in parts]) for name in names
    }


def stacked(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Join arrays (B, ...) along the first dimension.

    Where they differ in the others (micro-batches of other lengths) they are filled up: with -100, floats with nan.
    """
    shape = np.max([part.shape[1:] for part in parts], axis=0).astype(int).tolist()
    if all(list(part.shape[1:]) == shape for part in parts):
        return np.concatenate(parts)
    fill = np.nan if parts[0].dtype.kind == "f" else -100
    result = np.full((sum(len(part) for part in parts), *shape), fill, dtype=parts[0].dtype)
    start = 0
    for part in parts:
        result[(slice(start, start + len(part)), *(slice(size) for size in part.shape[1:]))] = part
        start += len(part)
    return result
