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

    def take(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Any:
        """Return the same with copies, or None if there is not the memory for them, now or once before; says so.

        Waits for the device, and then for no longer than the bytes take to the machine's memory.
        """
        size = sum(getattr(each, "_local_tensor", each).nbytes for of in tensors.values() for each in of.values())
        if self._fits is None and size > _room():
            return self._do_without(
                f"a copy of {size / 1e9:.1f} GB would take more than half of the memory that is free"
            )
        if self._fits is False:
            return None
        self._fits = True
        try:
            return self._stage(tensors)
        except (RuntimeError, MemoryError) as error:  # of torch's allocator, of CUDA, which pins it
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return self._do_without(f"a copy of {size / 1e9:.1f} GB could not be made ({reason})")

    def _do_without(self, reason: str) -> None:
        self._fits, self._stager = False, None
        log.warning(
            "training waits while a checkpoint is written: %s. So it does with checkpoint.background=false", reason
        )

    def _stage(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Any:
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


def _room() -> float:
    """Return the bytes that copies may take; all processes of a machine take theirs at once."""
    return hardware.free_memory() * SHARE / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
