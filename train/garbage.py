"""When Python looks for garbage, objects that hold each other in a circle: between updates, on all processes alike.

By itself it looks after so many new objects: within an update, and on each process within another, while the others
wait. Among all that the libraries have made that takes as long as an update, or longer (0.8 s on a slow core).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 50
"""Updates between two collections."""


@contextmanager
def only_when_told() -> Iterator[None]:
    """Leave it to `gc.collect`. What is there already is passed over, so that it looks at what updates leave alone.

    Afterwards, however it ends, Python looks by itself again if it did before.
    """
    with _automatically(False):
        gc.collect(1)  # of the newest objects: what is garbage now stays until the end
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()


@contextmanager
def by_itself() -> Iterator[None]:
    """Let Python look by itself, within `only_when_told`: in work that may be long, such as an evaluation."""
    with _automatically(True):
        yield
    gc.collect()


@contextmanager
def _automatically(wanted: bool) -> Iterator[None]:
    before = gc.isenabled()
    (gc.enable if wanted else gc.disable)()
    try:
        yield
    finally:
        (gc.enable if before else gc.disable)()
