"""Forward and backward passes before the first update: they teach nothing, and find out what is used or settle it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache

from data.batches import Feed
from data.errors import UserError
from data.plan import Bounds
from train import compilation, signals, watch
from train.ingredients import Ingredients
from train.memory import ONE_ROW, is_lacking, is_shared_out
from train.together import meet

log = logging.getLogger("train")


def first_loss(ingredients: Ingredients, batches: Feed) -> Callable[[], object]:
    """Return the forward pass of this process's first micro-batch: to watch what it uses."""
    accelerator, task = ingredients.accelerator, ingredients.task
    model = ingredients.model.to(accelerator.device)
    in_order_of_size = batches.cuts, replace(batches.cuts, bounds=Bounds(rows=1))

    def forward() -> object:
        for cut in in_order_of_size:
            try:
                tensors = send_to_device(cut.batch(1).parts[0].tensors, accelerator.device)
                with accelerator.autocast():
                    return task.loss(model, tensors)
            except RuntimeError as error:
                if not is_lacking(error):
                    raise
        raise UserError(ONE_ROW)

    return forward


def compile_now(model: Any, ingredients: Ingredients, batches: Feed) -> None:
    """Let the layers that are to be compiled be so, by the run's first micro-batch.

    Kernels are made for sizes like those that they meet first: of a resumed run, too, these are the first update's, so
    that it computes to the last bit what one computes that went on. Raises `UserError` where nothing can be compiled,
    and `Stopped` on all processes if one was asked to stop meanwhile.
    """
    accelerator = ingredients.accelerator
    shared_out = is_shared_out(accelerator, model)
    net = model if shared_out else accelerator.unwrap_model(model)  # copies do not wait for each other here
    watch.beat()
    try:
        tensors = send_to_device(batches.cuts.batch(1).parts[0].tensors, accelerator.device)
        with compilation.explained():
            accelerator.backward(ingredients.task.loss(net, tensors) * 0)
    except RuntimeError as error:
        if not is_lacking(error):
            raise
        if shared_out:
            raise UserError(
                "out of memory with the first micro-batch: lower micro_batch_size or micro_batch_tokens"
            ) from error
        clear_device_cache(garbage_collection=True)  # the first update finds what fits
    model.zero_grad()
    watch.beat()
    meet(signals.stopping())


def settle_buckets(model: Any, ingredients: Ingredients, batches: Feed) -> None:
    """Let DDP learn its graph and arrange its buckets before the first update.

    It does so in its first backward pass, and the arrangement decides in which order more than two processes are
    summed: a resumed run would differ in the last bits from one that went on. And a static graph is legal for this
    reason alone: of an update in several micro-batches all but the last are in `no_sync`, and DDP fails if it meets
    that first (torch 2.13: "INTERNAL ASSERT FAILED"); afterwards their number may change from update to update.
    """
    accelerator = ingredients.accelerator
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        one_row = replace(batches.cuts, bounds=Bounds(rows=1), smaller=[])  # which fits, if anything does
        tensors = send_to_device(one_row.batch(1).parts[0].tensors, accelerator.device)
        with compilation.eager():  # a single row would be compiled for itself
            accelerator.backward(ingredients.task.loss(model, tensors) * 0)
        model.zero_grad()
