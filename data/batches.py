"""Positions → batches of CPU tensors, this process's share of each: the last step before somebody learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data.encoded import REAL, Encoded, Features, take
from data.errors import UserError
from data.order import Order
from data.plan import Bounds, MicroBatch, computed, cost, plan_batch
from data.reader import Reader
from data.windows import grouped

if TYPE_CHECKING:
    from torch import Tensor

Collate = Callable[[Features], "dict[str, Tensor]"]
Count = Callable[[Features], int]
Places = dict[str, list[Any]]
Position = dict[str, Any] | None
"""Where a stream stands, as plain values."""


@dataclass(frozen=True)
class Part:
    """A micro-batch of tensors, first dimension B. A filler is computed with weight 0 (see `plan.MicroBatch`)."""

    tensors: dict[str, Tensor]
    examples: NDArray[np.int64]
    filler: bool
    rows: NDArray[np.int64]
    """Each example's place in the batch, (B,)."""


@dataclass(frozen=True)
class Batch:
    """One update's examples: what this process computes of them, and what all processes know of the whole."""

    parts: list[Part]
    examples: NDArray[np.int64]
    """Ids over all processes."""
    targets: int
    """Targets over all processes: known from the data, so that no process has to ask the others."""
    tokens: int
    """Real tokens over all processes."""
    computed: int
    """Tokens that are computed over all processes: padding counts where it is computed."""
    lengths: NDArray[np.int64]
    """Tokens of each example, over all processes: of several sequences, what they take when computed."""
    recut: Callable[[], Batch]
    """Cuts the same examples anew, by the bounds that hold by then."""
    places: Callable[[], Places] = dict
    """Where its examples come from, in order: {"rows": [...]}, and what else it takes to find them."""
    position: Position = None
    """Where a stream stands after it; None where the update's number says it."""
    skipped: tuple[str, ...] = ()
    """Unusable rows that a stream came upon on the way to it: where they are, and what is wrong with them."""


class Feed(Protocol):
    """What a run takes its batches from: examples in memory-mapped files (`Batches`), or a stream."""

    @property
    def updates_per_epoch(self) -> int:
        """How many updates take every example once; 0 where nobody knows."""

    @property
    def cuts(self) -> Batches:
        """What knows how micro-batches are cut, and gives a batch such as there will be."""

    @property
    def fingerprint(self) -> str:
        """Of what update numbers and positions refer to: they mean nothing without it."""

    def __str__(self) -> str:
        """Say how much there is."""

    def between(self, done: int, updates: int, position: Position = None) -> Iterator[tuple[int, Batch]]:
        """Yield (number, batch) for the updates after number `done`, whose batch told `position`, up to `updates`."""

    def padding_efficiency(self) -> float:
        """Return real over computed tokens, estimated."""

    def examples_until(self, update: int) -> int:
        """Return how many examples the first `update` updates take."""


@dataclass(frozen=True)
class Batches:
    """The batches of a training run, from any update on, for process `process` of `world`."""

    encoded: Encoded
    order: Order
    bounds: Bounds
    collate: Collate
    count: Count
    world: int = 1
    process: int = 0
    smaller: list[tuple[int, Bounds]] = field(default_factory=list)
    """Bounds that hold instead from some update on, in the order in which they were found to be needed."""
    window: int | None = None
    """Updates whose examples are sorted by length and dealt to them anew (see `windows`); None: they come as drawn."""

    def bounds_of(self, update: int) -> Bounds:
        """Return the bounds of the micro-batches of update number `update`."""
        return next((bounds for first, bounds in reversed(self.smaller) if first <= update), self.bounds)

    def halve(self, update: int, lengths: NDArray[np.int64], alone: str) -> Bounds:
        """Cut update `update`, and all after it, into micro-batches of at most half the size; return their bounds.

        lengths: tokens of its examples. The same on all processes, whoever asked for it. Raises `UserError`, with the
        text `alone`, where every micro-batch is a single row already.
        """
        bounds = self.bounds_of(update)
        parts = [part.rows for share in plan_batch(lengths, bounds, self.world) for part in share]
        sizes = [(len(rows), cost(lengths, rows, bounds)) for rows in parts if len(rows) > 1]
        if not sizes:
            raise UserError(alone)
        most, tokens = (max(column) // 2 for column in zip(*sizes, strict=True))
        halved = replace(bounds, rows=bounds.rows and most, tokens=bounds.tokens and min(bounds.tokens, tokens))
        self.smaller.append((update, halved))
        return halved

    @property
    def cuts(self) -> Batches:
        """These: they know how micro-batches are cut."""
        return self

    @property
    def updates_per_epoch(self) -> int:
        """How many updates take every example once (or its source's share)."""
        return self.order.updates_per_epoch

    @property
    def fingerprint(self) -> str:
        """Of the encoded examples."""
        return self.encoded.fingerprint

    def __str__(self) -> str:
        """Say how much there is."""
        sorted_by = "" if self.window is None else f", of similar length within windows of {self.window} updates"
        return f"{self.order.updates_per_epoch:,} an epoch{sorted_by}"

    def examples_until(self, update: int) -> int:
        """Return how many examples the first `update` updates take."""
        return self.order.examples_until(update)

    def batch(self, update: int) -> Batch:
        """Return the batch of update number `update`, from 1: a function of the number alone."""
        ids, features = self._reader.read(update)
        return self.cut(update, ids, features, partial(_places, self.encoded, ids))

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.encoded, self.order, self._examples)

    def _examples(self, update: int) -> NDArray[np.int64]:
        if self.window is None:
            return self.order.examples(update)
        return grouped(self.order, update, self.window, self._reader.encoded.lengths)

    def cut(
        self, update: int, ids: NDArray[np.int64], features: Features, places: Callable[[], Places] = dict
    ) -> Batch:
        """Return the batch of these examples, whose features all processes know, cut for this one as `update` is."""
        bounds, real = self.bounds_of(update), REAL if REAL in features else "length"
        lengths = features[real if bounds.padding_free else "length"]
        plan = plan_batch(lengths, bounds, self.world)
        return Batch(
            parts=[_part(micro_batch, ids, features, self.collate) for micro_batch in plan[self.process]],
            examples=ids,
            targets=self.count(features),
            tokens=int(features[real].sum()),
            computed=sum(computed(lengths, share, bounds) for share in plan),
            lengths=lengths,
            recut=partial(self.cut, update, ids, features, places),
            places=places,
        )

    def between(self, done: int, updates: int, position: Position = None) -> Iterator[tuple[int, Batch]]:
        """Yield (number, batch) for the updates after number `done` up to number `updates`. Needs no position."""
        for update in range(done + 1, updates + 1):
            yield update, self.batch(update)

    def padding_efficiency(self, sample: int = 200) -> float:
        """Return real over computed tokens in the first epoch, from at most `sample` batches; reads lengths only."""
        batches = self._sampled(max(10, sample // self.world))  # a plan for many processes takes longer
        ids, bounds = np.concatenate(batches), self.bounds
        real = self.encoded.tokens(ids)
        lengths = real if bounds.padding_free else self.encoded.lengths(ids)
        each = np.split(lengths, np.cumsum([len(one) for one in batches])[:-1])
        plans = ((lengths, plan_batch(lengths, bounds, self.world)) for lengths in each)
        return int(real.sum()) / sum(computed(lengths, share, bounds) for lengths, plan in plans for share in plan)

    def _sampled(self, sample: int) -> list[NDArray[np.int64]]:
        """Return the examples of about `sample` updates, spread over the first epoch."""
        size, last = self.order.batch_size, self.order.updates_per_epoch
        if self.window is not None:  # each whole: it is made once
            windows = -(-last // self.window)
            chosen = np.linspace(0, windows - 1, min(max(1, sample // self.window), windows)).astype(int).tolist()
            first = [number * self.window + 1 for number in chosen]
            return [self._examples(it) for each in first for it in range(each, min(each + self.window, last + 1))]
        places = np.linspace(0, last - 1, min(sample, last)).astype(np.int64)
        ends = np.minimum((places + 1) * size, self.order.epoch_size)
        positions = [np.arange(batch * size, end) for batch, end in zip(places.tolist(), ends.tolist(), strict=True)]
        found = self.order.at(0, np.concatenate(positions))  # one walk for all of them
        return np.split(found, np.cumsum([len(each) for each in positions])[:-1])


def _places(encoded: Encoded, ids: NDArray[np.int64]) -> Places:
    return {**encoded.sources(ids), "rows": encoded.features(ids)["row"].tolist()}


def _part(micro_batch: MicroBatch, ids: NDArray[np.int64], features: Features, collate: Collate) -> Part:
    rows = micro_batch.rows
    return Part(collate(take(features, rows)), ids[rows], micro_batch.filler, rows)
