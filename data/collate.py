"""Sequences of different lengths → padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


def pad(sequences: Sequence[NDArray[Any]], value: int, *, left: bool = False) -> Tensor:
    """Return integer sequences as one int64 tensor (B, T), T the longest, filled up with `value`."""
    import torch

    places = _places(tuple(map(len, sequences)), left=left)
    result = np.full(places.shape, value, dtype=np.int64)
    result[places] = np.concatenate(sequences)
    return torch.from_numpy(result)


def mask(sequences: Sequence[NDArray[Any]], *, left: bool = False) -> Tensor:
    """Return the attention mask (B, T) of padded sequences: 1 on their tokens, 0 on padding."""
    import torch

    return torch.from_numpy(_places(tuple(map(len, sequences)), left=left).astype(np.int64))


@lru_cache(maxsize=2)  # the mask of what was just padded is asked for next
def _places(lengths: tuple[int, ...], *, left: bool) -> NDArray[np.bool_]:
    """Return where sequences stand when they are padded, (B, T)."""
    longest = max(lengths)
    columns, ends = np.arange(longest), np.array(lengths)[:, None]
    return columns >= longest - ends if left else columns < ends
