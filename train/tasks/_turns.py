"""The last turn of packed conversations: what stands before it, and how it goes in the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.encode import Encoded
from train.tasks.base import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

Tokens = NDArray[np.int64]


def prompts(tensors: Mapping[str, Tensor]) -> list[Tokens]:
    """Return what the last turn of each conversation of collated examples is written from: all tokens before it."""
    ids, labels, pieces = (tensors[name].cpu().numpy() for name in ("input_ids", "labels", "pieces"))
    found = []
    for row, sizes in enumerate(pieces):
        for start, stop in _bounds(sizes[sizes > 0]):
            found.append(ids[row, start:stop][: _last(labels[row, start:stop])[0] + 1])
    return found


def references(encoded: Encoded, tokenizer: Any) -> list[list[str]]:
    """Return for each example the text of the last turn of each of its conversations, as far as it is not cut."""
    found = []
    for place in range(len(encoded.dataset)):
        features = encoded.features(np.array([place]))
        labels, turns = features["labels"][0], []
        for start, stop in _bounds(features["pieces"][0]):
            turn = labels[start:stop][slice(*_last(labels[start:stop]))]
            turns.append(tokenizer.decode(turn, skip_special_tokens=True).strip())
        found.append(turns)
    return found


def _bounds(sizes: Tokens) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(sizes).tolist()
    yield from zip([0, *ends[:-1]], ends, strict=True)


def _last(labels: Tokens) -> tuple[int, int]:
    """Return from where to where in a conversation's labels (T,) the last of the assistant's turns goes."""
    edges = np.diff(np.concatenate([[0], labels != IGNORED, [0]]))
    return int(np.flatnonzero(edges > 0)[-1]), int(np.flatnonzero(edges < 0)[-1])
