"""The order of examples: a pure function of (seed, epoch), in O(1) memory, that knows no process count.

Update `u` of a run is a fixed set of examples. Resuming is therefore arithmetic: nothing is stored and nothing skipped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

ROUNDS = 8  # four are enough for large domains; eight keep small ones (a few dozen rows) uniform too
BLOCK = 2048  # positions permuted at once: what a walk costs hardly depends on how many there are


def derive(*parts: int | str) -> int:
    """Return 63 random-looking bits that depend on `parts` alone, on every machine and in every Python."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permute(positions: Indices, size: int, key: int) -> Indices:
    """Map each position in [0, size) to its place in the permutation of [0, size) that `key` names.

    A Feistel network over the smallest even number of bits that holds `size`, walked along its cycle until it falls
    inside (Black and Rogaway, https://eprint.iacr.org/2001/012, "cycle walking"; at most 4 steps on average).
    Time O(len(positions)), memory O(len(positions)), whatever `size` is.
    """
    half = max(2, (int(size - 1).bit_length() + 1) // 2)
    keys = [np.uint64(derive(key, number)) for number in range(ROUNDS)]
    result = _feistel(positions.astype(np.uint64), half, keys)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _feistel(result[outside], half, keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def example_keys(ids: Indices, *parts: int | str) -> NDArray[np.uint64]:
    """Return 64 random-looking bits for each example id, (n,), that depend on it and on `parts` alone.

    Whatever is random about an example (which tokens are masked) is drawn from them, so that it does not matter in
    which order, on which process or in which company the example is computed.
    """
    return _mix(ids.astype(np.uint64) + np.uint64(derive("example", *parts)))


def draws(keys: NDArray[np.uint64], places: Indices) -> NDArray[np.float64]:
    """Return a number from [0, 1) for each place of each key, the two broadcast together: keys (B, 1), places (T,).

    The sequence of a key is splitmix64's (its finalizer over key + step x place), so any place of it is known at once
    and a batch is drawn without a loop: 4,096 numbers in 0.1 ms. 53 bits, all that a float64 holds.
    """
    steps = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(keys + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _feistel(values: NDArray[np.uint64], half: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << np.uint64(half)) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return splitmix64's finalizer (https://doi.org/10.1145/2660193.2660195): each bit reaches every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Order:
    """Which examples each update takes.

    `sizes` are the rows of each source, `shares` how many examples an epoch draws from each (the sizes themselves
    unless sources are mixed by weight). A source is read pass after pass, each pass in its own order, so that no row
    is seen a second time before all were seen once. Example ids count through the sources: id = rows before + row.
    """

    sizes: tuple[int, ...]
    shares: tuple[int, ...]
    batch_size: int
    seed: int

    @property
    def epoch_size(self) -> int:
        """Examples in an epoch."""
        return sum(self.shares)

    @property
    def updates_per_epoch(self) -> int:
        """Updates in an epoch; the last may be made from fewer than `batch_size` examples."""
        return -(-self.epoch_size // self.batch_size)

    def examples_until(self, update: int) -> int:
        """Return how many examples the first `update` updates take."""
        epochs, within = divmod(update, self.updates_per_epoch)
        return epochs * self.epoch_size + within * self.batch_size

    def examples(self, update: int) -> Indices:
        """Return the example ids of update number `update` (from 1), shape (batch_size,) or less at an epoch's end."""
        epoch, within = divmod(update - 1, self.updates_per_epoch)
        start = within * self.batch_size
        end = min(start + self.batch_size, self.epoch_size)
        blocks = [_block(self, epoch, number) for number in range(start // BLOCK, -(-end // BLOCK))]
        skip = start // BLOCK * BLOCK
        return np.concatenate(blocks)[start - skip : end - skip]

    def at(self, epoch: int, positions: Indices) -> Indices:
        """Return the example ids at these positions of an epoch, each in [0, epoch_size)."""
        slots = permute(positions, self.epoch_size, derive(self.seed, "order", epoch))
        result = np.empty_like(slots)
        slot_start = id_start = 0
        for source, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            mine = (slots >= slot_start) & (slots < slot_start + share)
            if mine.any():
                result[mine] = id_start + self._rows(source, size, epoch * share + slots[mine] - slot_start)
            slot_start, id_start = slot_start + share, id_start + size
        return result

    def _rows(self, source: int, size: int, drawn: Indices) -> Indices:
        """Return the rows of a source that its draws number `drawn` take, counted from the start of the run."""
        passes = drawn // size
        rows = np.empty_like(drawn)
        for number in np.unique(passes):
            now = passes == number
            rows[now] = permute(drawn[now] % size, size, derive(self.seed, "rows", source, int(number)))
        return rows


@lru_cache(maxsize=2)
def _block(order: Order, epoch: int, number: int) -> Indices:
    """Return the ids at BLOCK neighbouring positions: one walk for many updates, not one for each."""
    start = number * BLOCK
    return order.at(epoch, np.arange(start, min(start + BLOCK, order.epoch_size), dtype=np.int64))


def shares(sizes: list[int], weights: list[float | None]) -> tuple[int, ...]:
    """Return how many examples an epoch draws from each source: in proportion to `weights`, as many as rows in all.

    Without weights every source gives each of its rows once. The shares sum to sum(sizes) (largest remainders).
    """
    if all(weight is None for weight in weights):
        return tuple(sizes)
    numbers = np.array([0.0 if weight is None else weight for weight in weights])
    exact = numbers / numbers.sum() * sum(sizes)
    result = np.floor(exact).astype(np.int64)
    for source in np.argsort(-(exact - result), kind="stable")[: sum(sizes) - int(result.sum())]:
        result[source] += 1
    return tuple(int(share) for share in result)
