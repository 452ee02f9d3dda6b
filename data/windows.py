"""Batches of similar length: what the updates of a window take is sorted by length and dealt to them anew.

A window takes exactly the examples that the order gives it, so an epoch does too, and an update stays a function of its
number: it is found by making its window.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data.order import Order, derive, permute

Indices = NDArray[np.int64]
Lengths = Callable[[Indices], Indices]
"""Example ids → tokens of each."""


def grouped(order: Order, update: int, size: int, lengths: Lengths) -> Indices:
    """Return the example ids of update number `update` (from 1), as many as `order` gives it, of similar length.

    Its window are the updates of an epoch that share its place // `size`; the last one may be smaller. Time and memory
    O(size x batch_size), once for all updates of a window.
    """
    epoch, within = divmod(update - 1, order.updates_per_epoch)
    number, place = divmod(within, size)
    return _window(order, epoch, number, size, lengths)[place]


@lru_cache(maxsize=8)  # what is asked for ahead is of later windows
def _window(order: Order, epoch: int, number: int, size: int, lengths: Lengths) -> list[Indices]:
    """Return the batches of a window.

    Examples of equal length stay in the order's own, and which batch comes when is drawn anew for each window: what is
    long or short must come at any time. The rest of an epoch, less than a batch, is left as it is: sorted with the
    others it would always be the longest.
    """
    start = number * size * order.batch_size
    end = min(start + size * order.batch_size, order.epoch_size)
    ids = order.at(epoch, np.arange(start, end, dtype=np.int64))
    count = len(ids) // order.batch_size
    whole, rest = np.split(ids, [count * order.batch_size])
    batches = whole[np.argsort(lengths(whole), kind="stable")].reshape(count, order.batch_size)
    turns = permute(np.arange(count), count, derive(order.seed, "window", epoch, number))
    return [*batches[turns], rest]
