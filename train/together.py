"""What all processes have to do alike."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from train import signals, watch

if TYPE_CHECKING:
    from accelerate import Accelerator

_HERE, _ALIVE = "lockstep/here", "lockstep/alive"
_told = float("-inf")


def anyone(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on any process: the same answer on all. One small reduce, and a wait for the device."""
    import torch

    if accelerator.num_processes == 1:
        return flag
    tensor: Any = torch.tensor([float(flag)], device=accelerator.device)
    return bool(accelerator.reduce(tensor, "sum").item() > 0)


def goes_on() -> None:
    """Say that long work goes on: to this process's watch and, at most once a second, to those who `wait`."""
    global _told
    watch.goes_on()
    now = time.monotonic()
    if now - _told >= 1:
        _told = now
        _tell()


@contextlib.contextmanager
def alive(seconds: float = float("inf")) -> Iterator[None]:
    """Say every second that this process lives, to those who `wait`: for work that cannot say itself how it goes on.

    No longer than for `seconds`: what takes longer may hang.
    """
    over, until = threading.Event(), time.monotonic() + seconds

    def say() -> None:
        while not over.wait(1) and time.monotonic() < until:
            _tell()

    saying = threading.Thread(target=say, name="alive", daemon=True)
    saying.start()
    try:
        yield
    finally:
        over.set()
        saying.join()


def timeout() -> timedelta | None:
    """Return when a collective of a group beside the default one fails: as late as there; None: torch's own choice."""
    return timedelta(seconds=watch.patience() + 30) if watch.patience() < float("inf") else None


class Line:
    """Where one thread of each process waits for the others'; `name` is the same on all, and no other line's."""

    def __init__(self, name: str) -> None:
        self._key = f"{_HERE}/{name}"
        self._met = 0

    def wait(self) -> None:
        """Wait until all processes are here, for as long as any that is not gives signs of life; all call it equally
        often.

        Not a collective, which would fail after the process group's timeout however much is yet to be read or
        downloaded. Raises `TimeoutError` after `watch.patience` seconds without a sign: whoever is missing has died, or
        is cut off.
        """
        shared = signals.store()
        if shared is None:
            return
        import torch

        self._met += 1
        shared.add(self._key, 1)
        seen, since, pause = -1, time.monotonic(), 0.001
        while shared.add(self._key, 0) < self._met * torch.distributed.get_world_size():
            watch.goes_on()  # this process does, and says itself if it waits in vain
            if (told := shared.add(_ALIVE, 0)) != seen:
                seen, since = told, time.monotonic()
            elif time.monotonic() - since > watch.patience():
                raise TimeoutError(
                    f"another process has given no sign of life for {watch.patience():g} seconds: it has died, or its "
                    "machine is cut off. Look at what it said last, and start the same command again. "
                    "(distributed.timeout)"
                )
            time.sleep(pause)
            pause = min(0.05, pause * 2)


_main = Line("main")


def wait() -> None:
    """Wait until the main threads of all processes are here: see `Line.wait`."""
    _main.wait()


def meet(stop: bool) -> None:
    """Wait until all processes are here, as `wait` does; raise `Stopped` on all if one has `stop` set."""
    from accelerate.utils import gather_object

    wait()
    if signals.store() is not None:
        stop = any(gather_object([stop or signals.stopping()]))
    if stop:
        raise signals.Stopped


def _tell() -> None:
    shared = signals.store()
    if shared is not None:
        with contextlib.suppress(RuntimeError):  # the process that holds the store has gone
            shared.add(_ALIVE, 1)
