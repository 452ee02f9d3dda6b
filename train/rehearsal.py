"""Forward and backward passes before the first update: they teach nothing, and find out what is used or settle it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from data.batches import Feed
from data.errors import UserError
from data.plan import Bounds, cost
from train import compilation, signals, watch
from train.ingredients import Ingredients
from train.memory import ONE_ROW, is_lacking
from train.recomputation import Choice, Estimate, Kept, choose, estimate, kept
from train.strategy import Strategy, copies
from train.together import meet


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


def nothing(model: Any, ingredients: Ingredients, batches: Feed) -> Callable[[], Tensor]:
    """Return what computes a loss of zero, of a single row: it fits, if anything does."""

    def forward() -> Tensor:
        one_row = replace(batches.cuts, bounds=Bounds(rows=1), smaller=[])
        tensors = send_to_device(one_row.batch(1).parts[0].tensors, ingredients.accelerator.device)
        return ingredients.task.loss(model, tensors) * 0

    return forward


def settle_memory(choice: Choice, ingredients: Ingredients, optimizer: Any, batches: Feed) -> None:
    """Decide whether layers are computed twice: the same on all processes. See `recomputation.choose`.

    On a GPU two micro-batches, of two rows and of up to eight, are computed to see what they keep; of fewer where the
    run's hold fewer.
    """
    accelerator, cuts = ingredients.accelerator, replace(batches.cuts, smaller=[])
    model = ingredients.model.to(accelerator.device)

    def seen(rows: int) -> Kept:
        most = min(rows, cuts.bounds.rows or rows)  # and hardly fewer, to save padding
        batch = replace(cuts, bounds=replace(cuts.bounds, rows=most, overhead=2**20)).batch(1)
        part = max(batch.parts, key=lambda each: len(each.rows))  # the first may be what was left over
        tensors = send_to_device(part.tensors, accelerator.device)

        def forward() -> object:
            with accelerator.autocast():
                return ingredients.task.loss(model, tensors)

        return Kept(cost(batch.lengths, part.rows, cuts.bounds), kept(model, forward))

    def needed() -> Estimate:
        lengths = cuts.batch(1).lengths
        rows, longest = -(-len(lengths) // accelerator.num_processes), max(ingredients.max_length, int(lengths.max()))
        tokens = min(rows, cuts.bounds.rows or rows) * longest  # an example of several sequences is longer than one
        tokens = max(longest, min(tokens, cuts.bounds.tokens or tokens))
        try:
            fewer, more = seen(2), seen(8)
        except RuntimeError as error:
            if not is_lacking(error):
                raise
            clear_device_cache(garbage_collection=True)
            fewer, more = Kept(0, 0.0), Kept(1, math.inf)
        mine = estimate(model, optimizer, fewer, more, tokens, _shares(accelerator))
        line = torch.tensor([mine.fixed, mine.per_token], dtype=torch.float64, device=accelerator.device)
        shared: Any = accelerator.reduce(line, "mean")
        return replace(mine, fixed=shared[0].item(), per_token=shared[1].item())

    memory = _memory(accelerator)
    if accelerator.num_processes > 1:  # that of the smallest
        every: Any = accelerator.gather(torch.tensor([memory], device=accelerator.device))
        memory = int(every.min())
    choose(model, choice, memory=memory, needed=needed if memory else None)


def _memory(accelerator: Any) -> int:
    """Return the bytes of a GPU's memory; 0 where layers are never computed twice but on request."""
    if accelerator.device.type != "cuda" or accelerator.distributed_type.value == "DEEPSPEED":
        return 0
    return torch.cuda.get_device_properties(accelerator.device).total_memory


def _shares(accelerator: Any) -> int:
    """Return how many processes hold the model together."""
    if not accelerator.is_fsdp2:
        return 1
    parallel = accelerator.parallelism_config
    return parallel.dp_shard_size if parallel and parallel.dp_shard_size > 1 else accelerator.num_processes  # type: ignore[no-any-return]


def compile_now(spread: Strategy, ingredients: Ingredients, batches: Feed) -> None:
    """Let the layers that are to be compiled be so, by the run's first micro-batch.

    Kernels are made for sizes like those that they meet first: of a resumed run, too, these are the first update's, so
    that it computes to the last bit what one computes that went on. Raises `UserError` where nothing can be compiled,
    and `Stopped` on all processes if one was asked to stop meanwhile.
    """
    accelerator = ingredients.accelerator
    apart = copies(accelerator) or accelerator.num_processes == 1  # copies do not wait for each other here
    watch.beat()
    try:
        tensors = send_to_device(batches.cuts.batch(1).parts[0].tensors, accelerator.device)
        with compilation.explained():
            loss = ingredients.task.loss(spread.net if apart else spread.model, tensors) * 0
            spread.backward(loss)
    except RuntimeError as error:
        if not is_lacking(error):
            raise
        if not apart:
            raise UserError(
                "out of memory with the first micro-batch: lower micro_batch_size or micro_batch_tokens"
            ) from error
        clear_device_cache(garbage_collection=True)  # the first update finds what fits
    spread.model.zero_grad()
    watch.beat()
    meet(signals.stopping())
