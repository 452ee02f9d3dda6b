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
        self._kept: dict[tuple[str, str], Tensor] = {}

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
        if self._stager is not None:
            self._stager.close()  # it holds itself, and with it what it has pinned
        self._fits, self._stager = False, None
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of a machine one is enough
            log.warning(
                "from here on training waits while a checkpoint is written: %s. checkpoint.background=false says so "
                "from the start",
                reason,
            )

    def _stage(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Any:
        every = {(part, name): each for part, of in tensors.items() for name, each in of.items()}
        if self._device.type == "cpu" and all(type(each) is torch.Tensor for each in every.values()):
            return self._copy(every)  # 35 ms of 268 MB, where torch's stager takes 47
        on_gpu = self._device.type == "cuda"
        if self._stager is None:
            # not `DefaultStager`, which in PyTorch 2.11 can be used once
            from torch.distributed.checkpoint._state_dict_stager import StateDictStager

            self._stager = StateDictStager(pin_memory=on_gpu)
        found = self._stager.stage({part: dict(of) for part, of in tensors.items()}, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize(self._device)
        return found

    def _copy(self, every: Mapping[tuple[str, str], Tensor]) -> dict[str, dict[str, Tensor]]:
        """Copy ordinary tensors of a CPU, by part and name."""
        if _kinds(self._kept) != _kinds(every):
            self._kept = {key: torch.empty_like(each) for key, each in every.items()}
        torch._foreach_copy_(list(self._kept.values()), list(every.values()))
        found: dict[str, dict[str, Tensor]] = {}
        for (part, name), copied in self._kept.items():
            found.setdefault(part, {})[name] = copied
        return found


def _kinds(tensors: Mapping[tuple[str, str], Tensor]) -> dict[tuple[str, str], tuple[torch.Size, torch.dtype]]:
    return {key: (each.shape, each.dtype) for key, each in tensors.items()}


def _room() -> float:
    """Return the bytes that copies may take; all processes of a machine take theirs at once."""
    return hardware.free_memory() * SHARE / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
