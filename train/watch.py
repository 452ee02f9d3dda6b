"""A process of several that shows no sign of life for too long writes down where it stands, and ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from typing import TextIO

_seconds = 0.0
_stream: TextIO | None = None
_beaten = float("-inf")


def begin(seconds: float) -> None:
    """Expect a sign of life at least every `seconds`, from the first `beat` on, if this is one of several processes.

    Otherwise the stacks of all threads are written and the process ends with code 1: by a thread of the interpreter's
    own that needs no lock, so whatever the process is waiting for. A process alone keeps nobody waiting.
    """
    global _seconds
    _seconds = seconds if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0.0
    rest()


def write_to(stream: TextIO | None) -> None:
    """Let the stacks be written to `stream`, which stays open until this is called again; None: to stderr."""
    global _stream, _beaten
    _stream = stream
    if _beaten > float("-inf"):
        _beaten = float("-inf")
        beat()


def beat() -> None:
    """Give a sign of life. Costs a look at the clock; once a second (0.1 ms) the time begins anew."""
    global _beaten
    now = time.monotonic()
    if _seconds and now - _beaten >= min(1.0, _seconds / 10):
        _beaten = now
        faulthandler.dump_traceback_later(_seconds, exit=True, file=_stream or sys.stderr)


def goes_on() -> None:
    """Give a sign of life in work that is also done where none is expected: it expects none after it either."""
    if _beaten > float("-inf"):
        beat()


def patience() -> float:
    """Return the seconds without a sign of life after which a process is given up: without end, if there is one."""
    return _seconds or float("inf")


def rest() -> None:
    """Expect nothing until the next sign of life: what comes now takes as long as it takes."""
    global _beaten
    _beaten = float("-inf")
    faulthandler.cancel_dump_traceback_later()
