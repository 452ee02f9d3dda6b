"""One optimizer update from one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray

from data.batches import Batch
from data.errors import UserError
from train.coupling import Anticipate, unchanged
from train.hardware import seed_dropout
from train.strategy import Strategy

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

Loss = Callable[["nn.Module", dict[str, "Tensor"]], "Tensor"]


@dataclass(frozen=True)
class Report:
    """What one update has seen, still on the device."""

    totals: Tensor
    """float64 (2,): the sum of the loss over all targets of the batch, and how many processes ask to stop."""
    grad_norm: Tensor
    targets: int
    rate: float
    alone: bool | None
    """The only process's own answer to `stop`; None if there are several."""

    def figures(self) -> dict[str, float]:
        """Return the figures of this update. Waits for the device."""
        return {
            "train/loss": self.totals[0].item() / self.targets,
            "train/grad_norm": self.grad_norm.item(),
            "train/lr": self.rate,
        }

    def stop(self) -> bool:
        """Whether any process has been asked to stop: the same answer everywhere.

        Waits for the device where there are several processes.
        """
        return self.alone if self.alone is not None else bool(self.totals[1].item() > 0)


@dataclass
class Learner:
    """A model and the rule by which it takes a batch."""

    strategy: Strategy
    loss: Loss
    rate: Callable[[int], float]
    scales: Callable[[int], Sequence[float]]
    """Each parameter group's part of the rate in an update; 0: it does not learn yet."""
    seed: int
    max_grad_norm: float | None
    max_nonfinite: int
    stopping: Callable[[], bool] = lambda: False
    anticipate: Anticipate = unchanged
    """Gives the tensors of each micro-batch: as they are, or with what the whole batch tells of them."""
    _skipped: list[tuple[int, NDArray[np.int64], Tensor]] = field(default_factory=list)
    _in_a_row: int = 0

    @property
    def accelerator(self) -> Accelerator:
        """What prepared model and optimizer."""
        return self.strategy.accelerator

    @property
    def model(self) -> nn.Module:
        """The model as Accelerate prepared it."""
        return self.strategy.model

    def update(self, number: int, batch: Batch) -> Report:
        """Make optimizer update `number` from this process's micro-batches of one batch.

        The loss is the mean over all targets of the batch on all processes, so it does not matter how the batch was
        cut. Dropout depends on (seed, number, process) alone. A non-finite loss or gradient leaves model and optimizer
        untouched on all processes. One process waits for the device nowhere; several meet in one small reduce, and
        where the losses of a batch's examples depend on each other in a sum of what they depend on (`coupling`).
        """
        seed_dropout(self.seed, number, self.accelerator.process_index)
        inputs = self.anticipate(self.model, batch)
        seed_dropout(self.seed, number, self.accelerator.process_index)  # what was anticipated drops the same units
        total = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        stop = self.stopping()
        total[1] = stop
        world = self.accelerator.num_processes
        for place, (part, tensors) in enumerate(zip(batch.parts, inputs, strict=True), 1):
            last = place == len(batch.parts)
            with self.strategy.part(last=last):  # gradients cross the wire once
                loss = self.loss(self.model, send_to_device(tensors, self.accelerator.device, non_blocking=True))
                loss = loss * 0 if part.filler else loss
                self.strategy.backward(loss * (world / batch.targets))  # the mean over processes makes it whole
            total[0] += loss.detach()
        total = self.accelerator.reduce(total, "sum") if world > 1 else total
        self._prepare_groups(number)
        grad_norm, skip = self.strategy.step(total[0], self.max_grad_norm)
        self._skipped.append((number, batch.examples, skip))
        return Report(total, grad_norm, batch.targets, self.rate(number), stop if world == 1 else None)

    def _prepare_groups(self, number: int) -> None:
        """Give each parameter group its rate for `number`, and drop the gradients of those that do not learn yet.

        They are computed all the same, since DDP reduces what was trainable when it began; but neither the norm nor the
        optimizer's moments nor weight decay see them.
        """
        rate = self.rate(number)
        for group, scale in zip(self.strategy.optimizer.param_groups, self.scales(number), strict=True):
            group["lr"] = rate * scale
            for parameter in () if scale else group["params"]:
                parameter.grad = None

    @property
    def unsettled(self) -> int:
        """Updates of which nobody has asked yet whether they were left out."""
        return len(self._skipped)

    def skipped(self, record: Callable[[int, list[int]], None]) -> None:
        """Call `record` with (number, example ids) of each update left out since the last call. Waits for the device.

        Raises `UserError` once `max_nonfinite` updates in a row were left out, after recording them.
        """
        if not self._skipped:
            return
        flags = torch.stack([skip for _, _, skip in self._skipped]).tolist()
        for (number, examples, _), flag in zip(self._skipped, flags, strict=True):
            self._in_a_row = self._in_a_row + 1 if flag else 0
            if flag:
                record(number, examples.tolist())
            if self._in_a_row >= self.max_nonfinite:
                raise UserError(
                    f"stopped at update {number}: the loss or gradient of {self._in_a_row} updates in a row was not "
                    f"finite, the last with the examples {examples.tolist()}. The model is as it was before them. "
                    "Lower optim.lr, use precision=fp32, or look at these rows"
                )
        self._skipped.clear()
