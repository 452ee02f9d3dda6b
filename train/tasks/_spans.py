"""Logits of start and end → losses, the best spans of each window, the best answers of each row as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.encoded import Encoded, Features
from train.tasks.base import inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS = 1_000  # rows whose texts are in memory at once


def logits(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of start and end, (B, T), -inf where neither may be; and where the context is, (B, T).

    The first three labels are the null position, the first token of the context and the one behind its last.
    """
    import torch

    found = model(**inputs(tensors))
    null, first, after, *_ = tensors["labels"].unsqueeze(2).unbind(1)
    place = torch.arange(found.start_logits.shape[1], device=null.device)
    context = (place >= first) & (place < after)
    precise = torch.promote_types(found.start_logits.dtype, torch.float32)
    start, end = (
        part.to(precise).masked_fill(~(context | (place == null)), -torch.inf)
        for part in (found.start_logits, found.end_logits)
    )
    return start, end, context


def losses(start: Tensor, end: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of the cross entropies of start and end, (B,); the last two labels are their places."""
    from torch.nn.functional import cross_entropy

    first, last = (cross_entropy(part, labels[:, place], reduction="none") for part, place in ((start, -2), (end, -1)))
    return (first + last) / 2


def best_spans(start: Tensor, end: Tensor, context: Tensor, longest: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, starts and ends, each (B, n), of the best spans of at most `longest` tokens, ends included.

    Every span is compared, not only those of a few good starts and ends; a score of -inf is no span. Takes B x T x
    longest numbers of memory.
    """
    import torch
    from torch.nn.functional import pad

    longest = min(longest, start.shape[1])
    starts, ends = (part.masked_fill(~context, -torch.inf) for part in (start, end))
    ahead = pad(ends, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)  # (B, T, longest)
    sums = (starts.unsqueeze(2) + ahead).flatten(1)
    found = sums.topk(min(most, sums.shape[1]))
    first = found.indices // longest
    return found.values, first, first + found.indices % longest


class Candidate(NamedTuple):
    """A span that could be the answer to a row."""

    text: str
    start: int
    """Its first character in the context."""
    score: float
    """The logit of its start plus that of its end."""


class Judged(NamedTuple):
    """What was found for one row over all its windows."""

    candidates: list[Candidate]
    """The best first; empty only where no score is finite."""
    null_odds: float
    """The lowest score of the null position in any window, less the best score of a span."""
    golds: list[str]
    first: int
    """The example that is its first window."""

    @property
    def span(self) -> str:
        """The best answer, whatever the null odds."""
        return self.candidates[0].text if self.candidates else ""

    def text(self, threshold: float | None) -> str:
        """Return the answer: "" for none, where the null odds are above the threshold; None: there is always one."""
        return "" if threshold is not None and self.null_odds > threshold else self.span


def judge(found: Mapping[str, NDArray[Any]], encoded: Encoded, most: int) -> Iterator[Judged]:
    """Yield for each row, in order, its `most` best spans over all its windows.

    found: scores (n, k), starts and ends (n, k): tokens of the context in the window, from 0; null_scores (n,).
    """
    rows = encoded.column("row")
    begins_row = np.append(True, rows[1:] != rows[:-1])
    begins_row[np.cumsum(encoded.sizes)[:-1]] = True
    firsts = np.append(np.flatnonzero(begins_row), len(rows))
    for chunk in range(0, len(firsts) - 1, ROWS):
        mine = firsts[chunk : chunk + ROWS + 1]
        features = encoded.features(np.arange(mine[0], mine[-1]))
        for first, last in zip(mine[:-1].tolist(), mine[1:].tolist(), strict=True):
            candidates = _candidates(found, features, range(first, last), int(mine[0]), most)
            low = float(found["null_scores"][first:last].min())
            odds = low - candidates[0].score if candidates else 0.0
            yield Judged(candidates, odds, json.loads(features["golds"][first - mine[0]]), first)


def _candidates(
    found: Mapping[str, NDArray[Any]], features: Features, windows: range, offset: int, most: int
) -> list[Candidate]:
    """Return the best spans of a row; `features` begin with window number `offset`. A place is listed once."""
    scores = found["scores"][windows.start : windows.stop]
    listed: dict[tuple[int, int], Candidate] = {}
    order = np.argsort(-scores, axis=None, kind="stable")
    for window, rank in zip(*np.unravel_index(order, scores.shape), strict=True):
        if len(listed) == most or not np.isfinite(scores[window, rank]):
            break
        example = windows[window]
        begins, ends = features["begins"][example - offset], features["ends"][example - offset]
        start = int(begins[found["starts"][example, rank]])
        end = int(ends[found["ends"][example, rank]])
        base = int(begins.min())
        raw = features["text"][example - offset][start - base : end - base]
        text = raw.strip()
        if text:
            start += len(raw) - len(raw.lstrip())
            listed.setdefault((start, start + len(text)), Candidate(text, start, float(scores[window, rank])))
    return list(listed.values())
