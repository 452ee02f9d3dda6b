"""Long work says that it goes on; whoever listens may count that as a sign of life, or raise to end the work."""

from __future__ import annotations

from collections.abc import Callable

Listener = Callable[[bool | None], None]
"""Called with whether the work has got on since the last call: False where it waits for another process; None once it
is done, and what comes next takes as long as it takes."""


def _nobody(got_on: bool | None) -> None:
    pass


_listener: Listener = _nobody


def listen(listener: Listener = _nobody) -> None:
    """Let `listener` be called at every `beat`, in place of the one before; without it nobody listens."""
    global _listener
    _listener = listener


def beat(*, got_on: bool | None = True) -> None:
    """Say that the work at hand goes on. Called every few seconds or more often; raises what the listener raises."""
    _listener(got_on)
