"""Documents → rows of at most so many tokens: none lost, none twice, whatever their lengths.

What is packed are positions. A document of n + 1 tokens has n: each takes a token in and predicts the next one, so its
last token needs no place of its own. All functions are pure, and take the positions of each document.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """The positions from `start` to before `stop` of a document."""

    document: int
    start: int
    stop: int


Row = list[Piece]


def best_fit(lengths: Sequence[int], size: int) -> list[Row]:
    """Pack whole documents, the longest first, each into the fullest row that still holds it.

    Longer ones than `size` are first cut: into full rows, and a rest that is packed with the others. Rows come in the
    order of the documents that begin them, and so do the pieces within a row. O(n log n) for n pieces; for many of them
    at most 11/9 of the fewest rows possible (Johnson et al., https://doi.org/10.1137/0203025).
    """
    pieces = [row[0] for row in apart(lengths, size)]
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (free positions, row), sorted: the first that is large enough fits best
    for piece in sorted(pieces, key=lambda piece: piece.start - piece.stop):
        needed = piece.stop - piece.start
        place = bisect_left(room, (needed, 0))
        free, row = room.pop(place) if place < len(room) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        if free > needed:
            insort(room, (free - needed, row))
    return sorted(sorted(row) for row in rows)


def stream(lengths: Sequence[int], size: int) -> list[Row]:
    """Put all documents one after the other and cut the stream into rows of `size`; only the last may be shorter."""
    rows: list[Row] = []
    room = 0
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            if not room:
                rows.append([])
                room = size
            stop = min(length, start + room)
            rows[-1].append(Piece(document, start, stop))
            room -= stop - start
            start = stop
    return rows


def apart(lengths: Sequence[int], size: int) -> list[Row]:
    """Give each document rows of its own: consecutive pieces of `size`, and the remainder."""
    return [
        [Piece(document, start, min(length, start + size))]
        for document, length in enumerate(lengths)
        for start in range(0, length, size)
    ]
