"""The examples of updates, and their features: read for a few neighbouring updates at once, and asked for ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data.encoded import Encoded, Features
from data.order import Order, example_keys

TOGETHER = 256
"""Rows that are read at once: few take nearly as long as one."""

Read = tuple[NDArray[np.int64], Features]
"""Ids of examples, and their features."""


class Reader:
    """Reads what updates take. It keeps what was read at once last, and nothing depends on what that is."""

    def __init__(self, encoded: Encoded, order: Order, examples: Callable[[int], NDArray[np.int64]]) -> None:
        """examples: the ids of the examples of an update, of which `order` knows the epoch."""
        # what was asked for and is not there any more is then a wait for a page, not for 5 MB around it
        self.encoded = replace(encoded, alone=True) if encoded.asked else encoded
        self.order, self.examples = order, examples
        self._kept: tuple[range, list[Read]] = range(0), []  # replaced as one: there may be several threads

    def read(self, update: int) -> Read:
        """Return the ids of an update's examples and their features, with "key" among them (see `example_keys`)."""
        updates, found = self._kept
        if update not in updates:
            last, updates = updates, self._together(update)
            self._kept, found = (range(0), []), []  # not both at once
            if self.encoded.asked:
                self._ask(updates, anew=last.stop != updates.start)
            found = self._features(updates)
            self._kept = updates, found
        return found[update - updates.start]

    def _together(self, update: int) -> range:
        """Return the updates of its epoch that are read with an update."""
        epoch, within = divmod(update - 1, self.order.updates_per_epoch)
        several = max(1, TOGETHER // self.order.batch_size)
        first = update - within % several
        return range(first, min(first + several, (epoch + 1) * self.order.updates_per_epoch + 1))

    def _features(self, updates: range) -> list[Read]:
        each = [self.examples(update) for update in updates]
        ids, ends = np.concatenate(each), np.cumsum([len(one) for one in each]).tolist()
        keys = example_keys(ids, self.order.seed, (updates.start - 1) // self.order.updates_per_epoch)
        features = {**self.encoded.features(ids), "key": keys}
        parts = [slice(start, end) for start, end in pairwise([0, *ends])]
        return [(ids[part], {name: values[part] for name, values in features.items()}) for part in parts]

    def _ask(self, updates: range, *, anew: bool) -> None:
        """Ask for what is read after some updates: lists of the next, and of the one after what tells where.

        anew: nobody has asked for what is read now.
        """
        after = self._together(updates.stop)
        if anew:
            self._ask_for(updates, lists=False)
            self._ask_for(after, lists=False)
            self._ask_for(updates, lists=True)
        self._ask_for(self._together(after.stop), lists=False)
        self._ask_for(after, lists=True)

    def _ask_for(self, updates: range, *, lists: bool) -> None:
        self.encoded.ask(np.concatenate([self.examples(update) for update in updates]), lists=lists)
