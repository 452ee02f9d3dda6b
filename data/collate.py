"""Sequences of different lengths → padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


def pad(sequences: Sequence[NDArray[Any]], value: int, *, left: bool = False) -> Tensor:
    """Return integer sequences as one int64 tensor (B, T), T the longest, filled up with `value`."""
    import torch

    longest = max(len(sequence) for sequence in sequences)
    result = np.full((len(sequences), longest), value, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        result[row, longest - len(sequence) if left else 0 :][: len(sequence)] = sequence
    return torch.from_numpy(result)


def mask(sequences: Sequence[NDArray[Any]], *, left: bool = False) -> Tensor:
    """Return the attention mask (B, T) of padded sequences: 1 on their tokens, 0 on padding."""
    return pad([np.ones(len(sequence), dtype=np.int64) for sequence in sequences], 0, left=left)
