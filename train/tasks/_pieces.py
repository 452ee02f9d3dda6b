"""Documents packed in one row: their positions, and what each of them sums up to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.encoded import Encoded

if TYPE_CHECKING:
    from torch import Tensor


def positions(rows: Sequence[NDArray[Any]], width: int) -> NDArray[np.int64]:
    """Return position_ids (B, width) that begin anew in each document of each row, given the documents' sizes; the
    padding behind them is one more."""
    found = np.empty((len(rows), width), dtype=np.int64)
    for row, sizes in enumerate(rows):
        ends = sizes.cumsum()
        size = int(ends[-1])
        found[row, :size] = np.arange(size) - np.repeat(ends - sizes, sizes)
        found[row, size:] = np.arange(width - size)
    return found


def sums(values: Tensor, sizes: Tensor) -> Tensor:
    """Return the sum of values (B, T) over each document, (B, P), of sizes (B, P): 0 where a row has fewer."""
    import torch

    places = torch.arange(values.shape[1], device=values.device).expand_as(values).contiguous()
    piece = torch.searchsorted(sizes.cumsum(1), places, right=True)
    belongs = piece[:, None] == torch.arange(sizes.shape[1], device=values.device)[:, None]  # (B, P, T)
    return (values[:, None] * belongs).sum(2)


def by_row(
    encoded: Encoded, *columns: Sequence[Sequence[Any]]
) -> Iterator[tuple[dict[str, int], list[tuple[Any, ...]]]]:
    """Yield each row's place, in order, with what `columns` hold of its pieces: an entry for each piece.

    `columns` are nested as the encoded column `rows`, which says of which row each piece is; they may be longer.
    """
    rows = encoded.dataset.data.column("rows").to_pylist()
    found: dict[tuple[int, int], list[tuple[Any, ...]]] = {}
    for place, several, *entries in zip(encoded.places(), rows, *columns, strict=True):
        for row, *values in zip(several, *entries, strict=False):
            found.setdefault((place.get("source", 0), row), []).append(tuple(values))
    several_sources = len(encoded.sizes) > 1
    for (source, row), pieces in sorted(found.items(), key=lambda item: item[0]):
        yield {**({"source": source} if several_sources else {}), "row": row}, pieces
