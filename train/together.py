"""What all processes have to do alike."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from train import signals

if TYPE_CHECKING:
    from accelerate import Accelerator

_met = 0


def anyone(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on any process: the same answer on all. One small reduce, and a wait for the device."""
    import torch

    if accelerator.num_processes == 1:
        return flag
    tensor: Any = torch.tensor([float(flag)], device=accelerator.device)
    return bool(accelerator.reduce(tensor, "sum").item() > 0)


def meet(stop: bool) -> None:
    """Wait until all processes are here, however long that takes; raise `Stopped` on all if one has `stop` set.

    Not a collective, which would fail after the process group's timeout: another process may be downloading a model.
    """
    global _met
    from accelerate.utils import gather_object

    shared = signals.store()
    if shared is not None:
        import torch

        _met += 1
        shared.add("lockstep/met", 1)
        while shared.add("lockstep/met", 0) < _met * torch.distributed.get_world_size():
            time.sleep(0.05)
        stop = any(gather_object([stop or signals.stopping()]))
    if stop:
        raise signals.Stopped
