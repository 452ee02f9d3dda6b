"""The slow imports, at once: what every run needs of torch, transformers, accelerate and datasets."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LIBRARIES = (
    "torch._dynamo",
    "transformers.modeling_layers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "datasets",
)
"""Those by which a run would get to the rest. PyTorch comes first, whole: while it registers its operators it looks
through all modules that are there already, for each of them."""


def slow() -> None:
    """Import what a run needs before its first update. Once for a process: again it does nothing.

    Python's search for garbage rests meanwhile, and passes over all of it until a first loop has ended (`garbage`):
    modules, classes and functions stay, and to look through half a million objects of them again and again takes a
    seventh of the start.
    """
    if "train.run" in sys.modules:
        return
    looks = gc.isenabled()
    gc.disable()
    try:
        importlib.import_module(LIBRARIES[0])
        with _without_scipy():
            for library in LIBRARIES[1:]:
                importlib.import_module(library)
        import train.run  # noqa: F401
    finally:
        gc.freeze()
        if looks:
            gc.enable()


@contextmanager
def _without_scipy() -> Iterator[None]:
    """While this lasts, transformers knows of no SciPy.

    Where there is one, it would import it for losses of object detection, which no task has: a tenth of the start.
    """
    utils: Any = importlib.import_module("transformers.utils")
    known = utils.is_scipy_available
    utils.is_scipy_available = lambda: False
    try:
        yield
    finally:
        utils.is_scipy_available = known
