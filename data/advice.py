"""What the system is told of the parts of a file that are mapped: advice, by which it reads earlier, or less.

Where it does not take it nothing is lost but time.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


def alone(first: int, last: int) -> None:
    """Tell that what is next to anything between two addresses will not be needed when it is.

    It otherwise reads some 5 MB around each page that is not in memory, 76 MB for 32 rows from anywhere: soon all of a
    file that memory has room for, but what is thrown away again of one that is larger.
    """
    first -= first % mmap.PAGESIZE
    _tell([(first, last - first)], "MADV_RANDOM")


def soon(first: NDArray[np.int64], last: NDArray[np.int64]) -> None:
    """Tell that what lies between pairs of addresses, [first, last), is needed soon: it is read in the meantime."""
    if not len(first):
        return
    pages, ends = first // mmap.PAGESIZE, -(-last // mmap.PAGESIZE)
    order = np.argsort(pages)
    pages, ends = pages[order], np.maximum.accumulate(ends[order])
    starts = np.flatnonzero(np.concatenate([[True], pages[1:] > ends[:-1]]))  # what touches is told of as one
    begins, ends = pages[starts], np.concatenate([ends[starts[1:] - 1], ends[-1:]])
    spans = zip((begins * mmap.PAGESIZE).tolist(), ((ends - begins) * mmap.PAGESIZE).tolist(), strict=True)
    _tell([*spans], "MADV_WILLNEED")


def _tell(spans: list[tuple[int, int]], what: str) -> None:
    """spans: (address of a page, bytes)."""
    if sys.platform not in ("linux", "darwin"):
        return
    for address, size in spans:
        _library().madvise(address, size, getattr(mmap, what))


@cache
def _library() -> Any:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library
