"""Ask a process to stop in a phase of a run that is chosen: by a signal to itself, or by the file."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from train import signals

PHASES = {
    "encoding": ("data.pulse", "beat", 3),
    "reference": ("train.reference", "example_keys", 2),
    "compile": ("torch._dynamo.backends.common", "aot_module_simplified", 1),
    "first update": ("train.update", "Learner.update", 1),
    "update": ("train.update", "Learner.update", 3),
    "evaluation": ("train.evaluation", "predictions", 2),
    "generation": ("train.tasks._generation", "_asked", 3),
    "saving": ("train.checkpoint", "Checkpoints._write", 1),
    "last evaluation": ("train.evaluation", "predictions", -2),
    "export": ("train.learned", "Learned.whole", 1),
    "flush": ("train.tracking", "Tracker.finish", 1),
}
"""Phase → where a process is in it: module, function, and in which call of it (negative: counted from the last update,
which is number 8)."""


@contextmanager
def asked(phase: str, rank: int, stop_file: str | None = None) -> Iterator[list[float]]:
    """Ask process `rank` to stop when it is in `phase`, by SIGUSR1 or, if it is given, by making `stop_file`.

    Gives a list to which the time at which it was asked is added.
    """
    module, name, place = PHASES[phase]
    if phase == "compile":
        sys.modules["torch"]._dynamo.reset()  # else what a run before has compiled is there
    owner: Any = import_module(module)
    *inside, name = name.split(".")
    for part in inside:
        owner = getattr(owner, part)
    times: list[float] = []
    calls = [0]

    def ask() -> None:
        times.append(time.monotonic())
        if stop_file is None:
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            Path(stop_file).touch()
            time.sleep(signals.LOOK)

    with pytest.MonkeyPatch.context() as patch:
        real: Callable[..., Any] = getattr(owner, name)

        def counted(*arguments: Any, **settings: Any) -> Any:
            calls[0] += place > 0 or _update[0] == 8
            if calls[0] == abs(place) and int(os.environ.get("RANK", "0")) == rank and not times:
                ask()
            if phase == "encoding":
                time.sleep(0.3)  # so long that the process that waits looks as well
            return real(*arguments, **settings)

        patch.setattr(owner, name, counted)
        patch.setattr("data.encode.CHUNK", 10 if phase == "encoding" else 1000)
        _note_updates(patch)
        signals.install()
        yield times


_update = [0]


def _note_updates(patch: pytest.MonkeyPatch) -> None:
    from train.update import Learner

    real = Learner.update

    def update(self: Learner, number: int, batch: Any) -> Any:
        _update[0] = number
        return real(self, number, batch)

    _update[0] = 0
    patch.setattr(Learner, "update", update)


def forget() -> None:
    """Let this process begin anew, as if it had left and been started again. Called on all processes together."""
    from accelerate.utils import wait_for_everyone

    several = "torch.distributed" in sys.modules and signals.store() is not None
    if several:
        wait_for_everyone()
        if os.environ["RANK"] == "0":
            signals.store().delete_key(signals._KEY)
        wait_for_everyone()
    signals._requested.clear()
    signals._told, signals._looked, signals._file = False, float("-inf"), None
