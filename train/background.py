"""Work that a thread of each process does together with those of the others, while training goes on."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from train import together, watch

if TYPE_CHECKING:
    from accelerate import Accelerator

_made = itertools.count()


class Background:
    """One piece of work at a time. It has a process group of its own, so that it gets into nobody's way; made on all
    processes together."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.group: Any = None
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=together.timeout())
        self._line = together.Line(f"background-{next(_made)}")
        self._thread: threading.Thread | None = None
        self._problem = ""
        self._broken: BaseException | None = None
        self._since = 0.0
        """When the step at hand began."""

    @property
    def busy(self) -> bool:
        """Whether something was begun whose end was not asked for yet."""
        return self._thread is not None

    def begin(self, steps: Sequence[Callable[[], None]], failed: Callable[[str], None]) -> None:
        """Begin with steps, as many on each process; none begins one before all have done the one before.

        Where a step fails, on this process or another, none follows, and `failed` is told why, by the thread. A step
        may take `watch.patience` seconds, and longer where it gives signs of life itself.
        """
        assert self._thread is None, "one at a time"
        self._problem, self._broken, self._since = "", None, time.monotonic()
        self._thread = threading.Thread(target=self._work, args=(steps, failed), name="background", daemon=True)
        self._thread.start()

    def end(self) -> str:
        """Wait until all is done; return what went wrong on this process or another, or an empty text.

        Raises what kept processes from agreeing on it.
        """
        self._join()
        if self._broken is not None:
            raise self._broken
        return self._problem

    def leave(self) -> None:
        """Wait for what is at hand, for as long as the process may be without a sign of life: for who leaves anyway."""
        if self._thread is not None:
            self._thread.join(None if self.group is None else watch.patience())

    def _join(self) -> None:
        assert self._thread is not None
        while self._thread.is_alive():
            self._thread.join(0.5)
            if time.monotonic() - self._since < watch.patience():
                watch.goes_on()  # else a step hangs, or gives signs of life itself, or waits, and says if in vain
        self._thread = None

    def _work(self, steps: Sequence[Callable[[], None]], failed: Callable[[str], None]) -> None:
        try:
            for step in steps:
                self._since = time.monotonic()
                with nullcontext() if self.group is None else together.alive(watch.patience()):  # not while it waits
                    problem = _problem_of(step)
                self._problem = self._agree(problem)
                if self._problem:
                    return failed(self._problem)
        except BaseException as error:  # another process has died, or is cut off: told to who waits
            self._broken = error

    def _agree(self, problem: str) -> str:
        """Return a problem if any process has one."""
        self._line.wait()
        if self.group is None:
            return problem
        failed = torch.tensor([float(problem != "")])
        torch.distributed.all_reduce(failed, group=self.group)
        return problem or ("another process failed" if failed.item() else "")


def _problem_of(step: Callable[[], None]) -> str:
    try:
        step()
    except Exception as error:  # disk full, no permission: torch, safetensors, the system: many kinds
        return f"{type(error).__name__}: {error}"
    return ""
