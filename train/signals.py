"""Requests to stop: SIGTERM, SIGUSR1 and Ctrl-C set a flag that the loop honours after the update at hand."""

from __future__ import annotations

import signal
from types import FrameType

_requested: list[int] = []


def install() -> None:
    """Install the handlers. Called before the slow imports: a scheduler may signal a process that has just begun."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _request)


def stopping() -> bool:
    """Whether this process has been asked to stop."""
    return bool(_requested)


def _request(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and signal.SIGINT in _requested:
        raise KeyboardInterrupt  # Ctrl-C a second time: at once, without a checkpoint
    _requested.append(number)
