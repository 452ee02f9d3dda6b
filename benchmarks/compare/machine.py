"""What is measured on, and how much of it others took in the meantime."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
QUIET = 0.05
"""Part of all processors that may be busy before anything is measured: a shell, a desktop."""


class Others:
    """Processor time that other processes than this and its children take from now on.

    Of a container it is all that the machine does. What a guest's host keeps for itself counts too, where it tells.
    """

    def __init__(self) -> None:
        self._began, self._taken = time.monotonic(), _taken()

    def part(self) -> float:
        """Return their part of all processors, 0 to 1. Children count as others' until they have been waited for."""
        capacity = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (_taken() - self._taken) / capacity))


def _taken() -> float:
    """Return the seconds that all others have taken since the machine was started."""
    times = psutil.cpu_times()
    own = sum(os.times()[:4])  # in user and system mode, this process and children that it has waited for
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal")) - own


def busy(seconds: float = 2.0) -> str | None:
    """Return why nothing can be measured now, or None."""
    others = Others()
    time.sleep(seconds)
    part = others.part()
    return f"others take {part:.0%} of its processors" if part > QUIET else None


def where() -> str:
    """Say on what, with what and when this was measured."""
    import torch
    import transformers

    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, commit {_commit()}, {time.strftime('%Y-%m-%d')}."
    )


def _commit() -> str:
    """Return the commit: as `COMMIT` says it, on a machine that has a copy of the files only, or as git does."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    with suppress(OSError):
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        return os.environ.get("COMMIT") or told or "unknown"
    return os.environ.get("COMMIT", "unknown")


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
