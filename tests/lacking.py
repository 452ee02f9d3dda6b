"""A machine whose memory holds only so many examples at once, on one process or on all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from train import evaluation, update


class _Lacking(torch.autograd.Function):
    """The identity; there is no memory for its gradient."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory (as if)")


@contextmanager
def memory_for(rows: int, where: str = "forward", rank: int | None = None, from_update: int = 1) -> Iterator[list[int]]:
    """Let a micro-batch of more than `rows` examples fail in its "forward" or "backward" pass, there only if it is the
    "last" of an update, or in an "evaluation".

    Gives a list to which the size of each that has failed is added.
    """
    failed: list[int] = []
    mine = rank is None or int(os.environ.get("RANK", "0")) == rank
    real, predicted = update.Learner._gradients, evaluation.predictions

    def too_large(size: int) -> bool:
        if mine and size > rows:
            failed.append(size)
        return mine and size > rows

    def gradients(self: update.Learner, number: int, batch: Any) -> torch.Tensor:
        loss, calls = self.loss, [0]

        def scarce(model: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
            calls[0] += 1
            spared = number < from_update or (where == "last" and calls[0] < len(batch.parts))
            if spared or not too_large(len(tensors["input_ids"])):
                return loss(model, tensors)
            if where == "forward":
                loss(model, tensors)  # DDP has begun with it
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ... bytes")
            result: torch.Tensor = _Lacking.apply(loss(model, tensors))  # type: ignore[no-untyped-call]
            return result

        self.loss = scarce
        try:
            return real(self, number, batch)
        finally:
            self.loss = loss

    def predictions(model: Any, task: Any, encoded: Any, part: Any, *rest: Any) -> Any:
        if too_large(len(part.rows)):
            raise torch.OutOfMemoryError("CUDA out of memory (as if)")
        return predicted(model, task, encoded, part, *rest)

    with pytest.MonkeyPatch.context() as patch:
        if where == "evaluation":
            patch.setattr(evaluation, "predictions", predictions)
        else:
            patch.setattr(update.Learner, "_gradients", gradients)
        yield failed
