"""What one peer notes while it learns, in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass, field

BEGUN = time.time()


@dataclass
class Meter:
    """Times of updates, and what went through the model in them."""

    warm: int
    ticks: list[float] = field(default_factory=list)
    real: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    """Of each batch, in the order of the updates: tokens without and with padding."""
    losses: list[float] = field(default_factory=list)

    def tick(self) -> None:
        """An update is over."""
        self.ticks.append(time.time())

    def report(self) -> None:
        """Print the figures of the updates after the first `warm`."""
        first, last = self.ticks[self.warm - 1], self.ticks[-1]
        told = {
            "seconds": last - first,
            "updates": len(self.ticks),
            "tokens": int(sum(self.real[self.warm : len(self.ticks)])),
            "first_update": self.ticks[0] - started(),
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "efficiency": sum(self.real) / sum(self.computed),
            "losses": self.losses,
        }
        print("FIGURES " + json.dumps(told), flush=True)


def started() -> float:
    """Return when this process began, in seconds since 1970."""
    if sys.platform != "linux":
        return BEGUN
    with open("/proc/self/stat", encoding="utf-8") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    with open("/proc/uptime", encoding="utf-8") as file:
        uptime = float(file.read().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
