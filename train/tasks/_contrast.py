"""Contrastive loss with all texts of a batch as negatives, its gradient, and how well pairs are found: in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2**24  # similarities held at once: 64 MB in fp32; a set of 10^5 pairs has 10^10


def text_keys(texts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Return 64 bits for each text, (n,), that tell it from others: of its tokens, which are all that a model sees."""
    digests = (blake2b(np.ascontiguousarray(ids, dtype=np.int64).tobytes(), digest_size=8).digest() for ids in texts)
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)


def losses(units: Tensor, keys: Tensor, scale: float, *, symmetric: bool) -> Tensor:
    """Return the loss of each pair, (N,), with all other texts as negatives: see `_chunks`."""
    import torch

    return torch.cat([*_chunks(units, keys, scale, symmetric)])


def cached(units: Tensor, keys: Tensor, scale: float, *, symmetric: bool) -> dict[str, Tensor]:
    """Return "losses" (N,) and "gradient" (N, S, D): that of their sum by the unit vectors (N, S, D).

    The gradient is gathered chunk by chunk, so that never more than `CHUNK` similarities are held.
    """
    import torch

    leaf = units.detach().requires_grad_()
    found = []
    with torch.enable_grad():
        for part in _chunks(leaf, keys, scale, symmetric):
            part.sum().backward()  # type: ignore[no-untyped-call]
            found.append(part.detach())
    assert leaf.grad is not None
    return {"losses": torch.cat(found), "gradient": leaf.grad}


def _chunks(units: Tensor, keys: Tensor, scale: float, symmetric: bool) -> Iterator[Tensor]:
    """Yield the losses of the first pairs, (R,), of the next, and so on.

    units: (N, S, D), an anchor, its positive, and S - 2 hard negatives, each of length 1; keys: (N, S), equal where
    texts are. The loss of a pair is the cross entropy of finding its positive among all positives and hard negatives by
    `scale` x cosine (https://arxiv.org/abs/1807.03748, equation 4); if `symmetric`, the mean of that and of finding its
    anchor among all anchors.

    What is no wrong answer is none of the candidates: a text that equals the pair's own positive, or its anchor, and
    the positive of another pair with the same anchor.
    """
    anchors, positives = units[:, 0], units[:, 1]
    hard, hard_keys = units[:, 2:].flatten(0, 1), keys[:, 2:].flatten()
    size = max(1, CHUNK // max(1, len(units) * (units.shape[1] - 1)))
    for start in range(0, len(units), size):
        rows = slice(start, start + size)
        found = _direction(anchors[rows], positives, keys[:, 0], keys[:, 1], rows, (hard, hard_keys), scale)
        if symmetric:
            none = (hard[:0], hard_keys[:0])
            other = _direction(positives[rows], anchors, keys[:, 1], keys[:, 0], rows, none, scale)
            found = (found + other) / 2
        yield found


def _direction(
    asked: Tensor,
    answers: Tensor,
    asked_keys: Tensor,
    keys: Tensor,
    rows: slice,
    hard: tuple[Tensor, Tensor],
    scale: float,
) -> Tensor:
    """Return the cross entropy (R,) of finding each asked text's own answer among all N answers and hard negatives."""
    import torch
    from torch.nn import functional

    own = torch.arange(len(answers), device=asked.device)[rows]
    mine, right = asked_keys[rows, None], keys[rows, None]
    candidates = torch.cat([keys, hard[1]])
    spared = (candidates == right) | (candidates == mine)
    spared[:, : len(keys)] |= asked_keys == mine
    spared.scatter_(1, own[:, None], False)  # not by indexing, for which a GPU would have to be waited for
    logits = (asked @ torch.cat([answers, hard[0]]).T * scale).masked_fill(spared, float("-inf"))
    return functional.cross_entropy(logits, own, reduction="none")


def places(units: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each anchor how many texts are more similar to it than its positive is, and how many as similar: (N,).

    The texts are the set's different positives: one that several pairs share is one, and what is right for an anchor
    (its positive in another pair) or is the anchor itself does not compete. The positive counts as one that is as
    similar as itself, so the second number is 1 where there is no tie.
    """
    import torch

    texts, own = np.unique(keys[:, 1].numpy(), return_inverse=True)
    first = np.full(len(texts), len(own))
    np.minimum.at(first, own, np.arange(len(own)))
    candidates = units[torch.from_numpy(first), 1]
    spared = _spared(keys.numpy(), texts, own)
    size = max(1, CHUNK // len(texts))
    counts = []
    for start in range(0, len(units), size):
        similar = units[start : start + size, 0] @ candidates.T
        mine = similar.gather(1, torch.from_numpy(own[start : start + size])[:, None])
        for row in range(len(similar)):
            if start + row in spared:
                similar[row, spared[start + row]] = float("-inf")
        counts.append(torch.stack([(similar < mine).sum(1), (similar == mine).sum(1)]))
    less, equal = torch.cat(counts, 1)
    equal = equal.clamp(min=1)  # what is not a number is found last
    return len(texts) - less - equal, equal


def _spared(keys: NDArray[np.int64], texts: NDArray[np.int64], own: NDArray[np.int64]) -> dict[int, list[int]]:
    """Return for each row that has some the texts, by place in `texts`, that do not compete with its own."""
    answers: dict[int, set[int]] = {}
    for anchor, place in zip(keys[:, 0].tolist(), own.tolist(), strict=True):
        answers.setdefault(anchor, set()).add(place)
    itself = np.searchsorted(texts, keys[:, 0]).clip(max=len(texts) - 1)
    for anchor, place in zip(keys[:, 0].tolist(), itself.tolist(), strict=True):
        if texts[place] == anchor:
            answers[anchor].add(place)
    rows = (
        (row, answers[anchor] - {place})
        for row, (anchor, place) in enumerate(zip(keys[:, 0].tolist(), own.tolist(), strict=True))
    )
    return {row: sorted(others) for row, others in rows if others}
