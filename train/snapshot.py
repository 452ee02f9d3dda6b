"""Copies of tensors in the machine's memory, so that training may go on while they are written."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from train import hardware

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("train")

SHARE = 0.5
"""Of the memory that is free, what copies may take."""


class Snapshot:
    """Copies whose memory is kept for the next ones: pinned, where they come from a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stager: Any = None
        self._fits: bool | None = None

    def take(self, tensors: Mapping[str, Mapping[str, Tensor]], *, speaks: bool) -> Any:
        """Return the same with copies, or None if there was not the memory for them at the first time; says so.

        Waits for the device, and then for no longer than the bytes take to the machine's memory.
        """
        if self._fits is None:
            self._fits = self._fit(tensors, speaks=speaks)
        if not self._fits:
            return None
        if self._stager is None:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            there = self._device.type == "cuda"
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=there,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=there,
                )
            )
        return self._stager.stage({part: dict(of) for part, of in tensors.items()})

    def _fit(self, tensors: Mapping[str, Mapping[str, Tensor]], *, speaks: bool) -> bool:
        """Whether there is room for copies; all processes of a machine take theirs at once."""
        local = [getattr(each, "_local_tensor", each) for of in tensors.values() for each in of.values()]
        size, processes = sum(each.nbytes for each in local), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room = hardware.free_memory() * SHARE / processes
        if size > room and speaks:
            log.warning(
                "training waits while a checkpoint is written: a copy of %.1f GB would take more than half of the "
                "memory that is free. checkpoint.background=false says so without this line",
                size / 1e9,
            )
        return size <= room
