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
from train import watch
from train.coupling import Anticipate, unchanged
from train.hardware import seed_dropout
from train.memory import Memory, is_lacking, take_part
from train.strategy import Strategy, copies

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

Loss = Callable[["nn.Module", dict[str, "Tensor"]], "Tensor"]


@dataclass(frozen=True)
class Report:
    """What one update has seen, still on the device."""

    loss: Tensor
    """float64: the sum of the loss over all targets of the batch."""
    grad_norm: Tensor
    targets: int
    rate: float
    stop: bool
    """Whether any process has been asked to stop: the same answer everywhere."""

    def figures(self) -> dict[str, float]:
        """Return the figures of this update. Waits for the device."""
        return {
            "train/loss": self.loss.item() / self.targets,
            "train/grad_norm": self.grad_norm.item(),
            "train/lr": self.rate,
        }


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
    memory: Memory | None = None
    """Cuts batches anew that do not fit; without it, that is the end."""
    _skipped: list[tuple[int, NDArray[np.int64], Tensor]] = field(default_factory=list)
    _in_a_row: int = 0
    _awaited: bool = False
    """Whether other processes wait for what this one is computing."""

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
        cut; if the memory does not suffice on any process, it is cut anew and the update begun anew. Dropout depends on
        (seed, number, process) alone. A non-finite loss or gradient leaves model and optimizer untouched on all
        processes. One process waits for the device nowhere; several meet in one small reduce and wait for it, and where
        the losses of a batch's examples depend on each other in a sum of what they depend on (`coupling`).
        """
        while (report := self._attempt(number, batch)) is None:
            assert self.memory is not None
            self.strategy.optimizer.zero_grad()
            batch = self.memory.smaller(number, batch)
        return report

    def _attempt(self, number: int, batch: Batch) -> Report | None:
        """Make the update, or nothing of it: None, on all processes, if the memory of one did not suffice."""
        total = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        stop, lacking, world = self.stopping(), False, self.accelerator.num_processes
        try:
            total[0] = self._gradients(number, batch)
        except RuntimeError as error:
            if self.memory is None or not is_lacking(error):
                raise
            lacking = True
            if self._awaited:
                self.memory.lost(number, batch)
        if lacking and world > 1:
            take_part(self.accelerator, self.model)
        if world > 1:
            total[1], total[2] = stop, lacking
            total = self.accelerator.reduce(total, "sum")
            stop, lacking = (count > 0 for count in total[1:].tolist())  # waits for the device
        if lacking:
            return None
        self._prepare_groups(number)
        grad_norm, skip = self.strategy.step(total[0], self.max_grad_norm)
        self._skipped.append((number, batch.examples, skip))
        return Report(total[0], grad_norm, batch.targets, self.rate(number), stop)

    def _gradients(self, number: int, batch: Batch) -> Tensor:
        """Add up the gradients of this process's micro-batches; return the sum of their losses, float64."""
        world, several = self.accelerator.num_processes, self.accelerator.num_processes > 1
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        within = several and not copies(self.accelerator)  # they wait for each other within a forward pass
        self._awaited = within or (several and self.anticipate is not unchanged)
        seed_dropout(self.seed, number, self.accelerator.process_index)
        inputs = self.anticipate(self.model, batch)
        seed_dropout(self.seed, number, self.accelerator.process_index)  # what was anticipated drops the same units
        self._awaited = within
        for place, (part, tensors) in enumerate(zip(batch.parts, inputs, strict=True), 1):
            watch.beat()
            last = place == len(batch.parts)
            with self.strategy.part(last=last):  # gradients cross the wire once
                loss = self.loss(self.model, send_to_device(tensors, self.accelerator.device, non_blocking=True))
                loss = loss * 0 if part.filler else loss
                self._awaited = self._awaited or (several and last)
                self.strategy.backward(loss * (world / batch.targets))  # the mean over processes makes it whole
            total += loss.detach()
        return total

    def _prepare_groups(self, number: int) -> None:
        """Give each parameter group its rate for `number`, and drop the gradients of those that do not learn yet.

        They are computed all the same, since DDP reduces what was trainable when it began; but neither the norm nor the
        optimizer's moments nor weight decay see them.
        """
        rate = self.rate(number)
        for group, scale in zip(self.strategy.optimizer.param_groups, self.scales(number), strict=True):
            group["lr"], group["update"] = rate * scale, number
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
                    f"finite, the last with the examples {examples.tolist()}. The model is as if they had not been. "
                    "Lower optim.lr, use precision=fp32 if it is bf16 or fp16, or look at these rows"
                )
        self._skipped.clear()
