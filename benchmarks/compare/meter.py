"""What one peer notes while it learns, in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

BEGUN = time.time()


@dataclass
class Meter:
    """Times of updates, and what went through the model in them.

    Numbers may be tensors on a GPU: they are read at the end, and the GPU is waited for after the first update, the
    last that is not counted, and the last of all only.
    """

    warm: int
    updates: int
    ticks: list[float] = field(default_factory=list)
    seen: list[list[tuple[Any, Any, Any]]] = field(default_factory=lambda: [[]])
    """Of each update, of each of its micro-batches: real tokens, tokens with padding, targets."""
    lost: list[list[Any]] = field(default_factory=lambda: [[]])
    """Of each update: what its micro-batches add to the mean loss of its targets. Read when the clock has stopped."""
    memory: float = 0.0
    """The most that was held up to the last update, in MB."""
    told: dict[str, Any] = field(default_factory=dict)
    """What else the peer says of itself."""

    def saw(self, tokens: Any, computed: Any, targets: Any) -> None:
        """A micro-batch of the update that is being made."""
        self.seen[-1].append((tokens, computed, targets))

    def lose(self, loss: Any) -> None:
        """Of the update that is being made: a part of its mean loss, not read yet."""
        self.lost[-1].append(loss)

    def tick(self) -> None:
        """An update is over."""
        if len(self.ticks) + 1 in (1, self.warm, self.updates):
            _wait()
        self.ticks.append(time.time())
        if len(self.ticks) == self.updates:
            self.memory = _memory()
        self.seen.append([])
        self.lost.append([])

    def report(self, matmul: float) -> None:
        """Print the figures of the updates after the first `warm`; matmul: the best one measured here, by `work`."""
        assert len(self.ticks) == self.updates, f"{len(self.ticks)} updates, not {self.updates}"
        numbers = [[sum(int(part[kind]) for part in parts) for kind in range(3)] for parts in self.seen[: self.updates]]
        real, computed, targets = zip(*numbers, strict=True)
        told = {
            "seconds": self.ticks[-1] - self.ticks[self.warm - 1],
            "updates": len(self.ticks),
            "tokens": sum(real[self.warm :]),
            "targets": sum(targets[self.warm :]),
            "all_tokens": sum(real),
            "all_targets": sum(targets),
            "first_update": self.ticks[0] - started(),
            "memory": self.memory,
            "matmul": matmul,
            "warm": self.warm,
            "efficiency": sum(real[self.warm :]) / sum(computed[self.warm :]),
            "losses": [sum(float(part) for part in parts) for parts in self.lost[: self.updates]],
            **self.told,
        }
        print("FIGURES " + json.dumps(told), flush=True)


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _memory() -> float:
    """Return the most that was allocated on the GPU, or was the process's on a CPU, in MB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
    # `ru_maxrss` begins with what the parent held when it forked; this begins with the program itself.
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024


def started() -> float:
    """Return when this process began, in seconds since 1970."""
    if sys.platform != "linux":
        return BEGUN
    with open("/proc/self/stat", encoding="utf-8") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    with open("/proc/uptime", encoding="utf-8") as file:
        uptime = float(file.read().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
