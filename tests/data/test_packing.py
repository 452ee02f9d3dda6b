"""Packing: no position lost, none twice, no row too long, and rows that are full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from data.packing import Piece, Row, apart, best_fit, stream

Pack = Callable[[Sequence[int], int], list[Row]]
PACKS = (best_fit, stream, apart)

lengths_of_documents = some.lists(some.integers(0, 40), max_size=60)


@pytest.mark.parametrize("pack", PACKS)
@settings(max_examples=300, deadline=None)
@given(lengths=lengths_of_documents, size=some.integers(1, 20))
def test_every_position_stands_in_one_row(pack: Pack, lengths: list[int], size: int) -> None:
    rows = pack(lengths, size)
    pieces = [piece for row in rows for piece in row]
    assert all(1 <= sum(piece.stop - piece.start for piece in row) <= size for row in rows)
    found = sorted((piece.document, place) for piece in pieces for place in range(piece.start, piece.stop))
    assert found == [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    assert all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert rows == pack(lengths, size)


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_of_documents, size=some.integers(1, 20))
def test_a_document_is_cut_only_where_it_must_be(lengths: list[int], size: int) -> None:
    for pack in (best_fit, apart):
        pieces = [piece for row in pack(lengths, size) for piece in row]
        for document, length in enumerate(lengths):
            mine = sorted(piece for piece in pieces if piece.document == document)
            assert len(mine) == -(-length // size)
            assert [piece.start for piece in mine] == list(range(0, length, size))
    assert all(len(row) == 1 for row in apart(lengths, size))


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_of_documents, size=some.integers(1, 20))
def test_rows_are_full(lengths: list[int], size: int) -> None:
    """A stream has one row that is not; best fit never leaves two rows that would go into one."""
    used = [sum(piece.stop - piece.start for piece in row) for row in stream(lengths, size)]
    assert all(length == size for length in used[:-1])
    used = sorted(sum(piece.stop - piece.start for piece in row) for row in best_fit(lengths, size))
    assert all(one + other > size for one, other in pairwise(used))


def test_best_fit_takes_the_fullest_row_that_holds_it() -> None:
    assert best_fit([6, 9, 1, 4, 23], 10) == [
        [Piece(0, 0, 6), Piece(3, 0, 4)],
        [Piece(1, 0, 9), Piece(2, 0, 1)],
        [Piece(4, 0, 10)],
        [Piece(4, 10, 20)],
        [Piece(4, 20, 23)],
    ]
    assert stream([6, 9], 10) == [[Piece(0, 0, 6), Piece(1, 0, 4)], [Piece(1, 4, 9)]]
    assert apart([6, 12], 10) == [[Piece(0, 0, 6)], [Piece(1, 0, 10)], [Piece(1, 10, 12)]]


def test_time_grows_with_the_number_of_documents_and_not_with_its_square() -> None:
    lengths = np.random.default_rng(0).integers(1, 1_000, 100_000).tolist()
    start = perf_counter()
    rows = best_fit(lengths, 1_024)
    assert perf_counter() - start < 10  # about a second; comparing each with each would take minutes
    assert sum(lengths) / len(rows) / 1_024 > 0.99
