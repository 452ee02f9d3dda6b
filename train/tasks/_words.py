"""Words and their pieces: which piece is of which word, and rows of words cut into windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def owners_of(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the word of each piece (pieces,), and the first piece of each word (words,), -1 where it has none.

    A piece is of the word that its last character is of; one of blanks alone, of the word that comes next.
    """
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    starts = ends - [len(word) for word in words]
    span = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    last = span[:, 1] - 1
    owners = np.searchsorted(ends, last, "right")  # the first word that ends behind it
    real = (last >= span[:, 0]) & (owners < len(words)) & (last >= starts[np.minimum(owners, len(words) - 1)])
    firsts = np.full(len(words), -1)
    places = np.flatnonzero(real)
    firsts[owners[places][::-1]] = places[::-1]
    following = np.searchsorted(places, np.arange(len(span)))
    if not len(places):
        return np.zeros(0, dtype=np.int64), firsts
    return owners[places][np.minimum(following, len(places) - 1)], firsts


@dataclass(frozen=True)
class Window:
    """Words `first` to `end` (not with it) of a row, and those of them that are judged here."""

    first: int
    end: int
    judged: NDArray[np.int64]


def windows(sizes: NDArray[np.int64], room: int, overlap: int) -> list[Window]:
    """Cover words of so many pieces, none more than `room`, by windows of at most `room` that share about `overlap`.

    Each word is judged in one window: where the nearer of the two cuts beside it is farthest, in pieces. The ends of
    the row are no cuts.
    """
    total, words = np.concatenate([[0], np.cumsum(sizes)]), len(sizes)
    first, end = 0, int(np.searchsorted(total, room, "right")) - 1
    spans = [(first, end)]
    while end < words:
        kept = max(total[end] - overlap, total[end + 1] - room)  # the next word must fit
        first = max(first + 1, int(np.searchsorted(total, kept)))
        end = int(np.searchsorted(total, total[first] + room, "right")) - 1
        spans.append((first, end))
    best, where = np.full(words, -1.0), np.zeros(words, dtype=np.int64)
    for number, (first, end) in enumerate(spans):
        left = total[first:end] - total[first] + (0 if first else np.inf)
        right = total[end] - total[first + 1 : end + 1] + (0 if end < words else np.inf)
        context = np.minimum(left, right)
        where[first:end][context > best[first:end]] = number
        best[first:end] = np.maximum(best[first:end], context)
    found = [Window(first, end, first + np.flatnonzero(where[first:end] == number))
             for number, (first, end) in enumerate(spans)]  # fmt: skip
    return [window for window in found if len(window.judged) or not words]
