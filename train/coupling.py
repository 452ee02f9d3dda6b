"""Losses that couple all examples of a batch: what each depends on is known before the first micro-batch learns.

This is gradient caching (GradCache, https://arxiv.org/abs/2101.06983) as far as the loop sees it: a first pass without
gradients, over micro-batches and processes, at the cost of one more forward pass and no more memory than before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import send_to_device

from data.batches import Batch
from train.tasks.base import Task

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

Tensors = dict[str, "Tensor"]
Anticipate = Callable[["nn.Module", Batch], Sequence[Tensors]]
"""(model, batch) → the tensors of each micro-batch of this process, in order."""


def unchanged(model: nn.Module, batch: Batch) -> Sequence[Tensors]:
    """Return the micro-batches as they are: their losses depend on nothing else."""
    return [part.tensors for part in batch.parts]


def coupled(task: Task, accelerator: Accelerator, model: nn.Module, batch: Batch) -> Sequence[Tensors]:
    """Return the micro-batches with what the task makes of the whole batch (`Task.share`, `Task.couple`).

    Every process puts its examples at their places in the batch and one sum over processes, of zeros but for these,
    gives the same whole to all of them, exact and in the batch's own order: it does not matter how it was cut. Fillers
    are computed, as all processes go through the model equally often, and not counted.
    """
    parts = [send_to_device(part.tensors, accelerator.device, non_blocking=True) for part in batch.parts]
    if accelerator.num_processes == 1 and len(parts) == 1:
        return parts  # the micro-batch is the whole batch
    places = [torch.from_numpy(part.rows).to(accelerator.device, non_blocking=True) for part in batch.parts]
    whole: Tensors = {}
    with torch.no_grad():
        for part, tensors, place in zip(batch.parts, parts, places, strict=True):
            for name, values in task.share(model, tensors).items():
                if name not in whole:
                    whole[name] = values.new_zeros((len(batch.examples), *values.shape[1:]))
                if not part.filler:
                    whole[name][place] = values
    if accelerator.num_processes > 1:
        whole = {name: accelerator.reduce(values, "sum") for name, values in whole.items()}
    known = task.couple(whole)
    return [
        {**tensors, **{name: values[place] for name, values in known.items()}}
        for tensors, place in zip(parts, places, strict=True)
    ]
