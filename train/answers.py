"""When two answers are the same, as SQuAD's official evaluation has it (https://rajpurkar.github.io/SQuAD-explorer)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Best(NamedTuple):
    """The best mean score that a threshold on the null odds can reach, and that threshold."""

    score: float
    threshold: float


def words(answer: str) -> list[str]:
    """Return the words that count: lower case, without ASCII punctuation and articles."""
    return ARTICLES.sub(" ", answer.lower().translate(NO_PUNCTUATION)).split()


def scores(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """Return (exact match, F1), each 0.0 to 1.0, against the gold answer that is best for it.

    "" is no answer, right where `golds` is empty. Gold answers of nothing but articles and punctuation do not count.
    """
    counted = [found for gold in golds if (found := words(gold))] or [[]]
    given = words(answer)
    return max(float(given == gold) for gold in counted), max(_f1(given, gold) for gold in counted)


def _f1(given: list[str], gold: list[str]) -> float:
    if not given or not gold:
        return float(given == gold)
    common = sum((Counter(given) & Counter(gold)).values())
    return 2 * common / (len(given) + len(gold))


def best(odds: NDArray[np.float64], answered: NDArray[np.float64], silent: NDArray[np.float64]) -> Best:
    """Return the threshold with the best mean score where rows with odds above it are left unanswered.

    odds: (n,) null odds; answered, silent: (n,) scores of a row if it is answered, and if not. The threshold lies
    halfway between the odds of two rows (or 1 beyond the last one), so that no rounding of it changes an answer. The
    same to the last bit in whatever order the rows come; of equally good thresholds the lowest.
    """
    gains = answered - silent
    order = np.lexsort((gains, odds))
    odds, gains = odds[order], gains[order]
    ends = np.flatnonzero(np.append(odds[1:] != odds[:-1], True)) + 1  # rows of equal odds go together
    answers = np.append(0, ends)  # the ways to draw the line: so many rows are answered
    reached = np.append(0.0, np.cumsum(gains))[answers]
    choice = int(np.argmax(reached))
    padded = np.concatenate(([odds[0] - 2], odds, [odds[-1] + 2]))
    low, high = padded[answers[choice]], padded[answers[choice] + 1]
    threshold = (low + high) / 2 if (low + high) / 2 < high else low
    return Best(float((np.sort(silent).sum() + reached[choice]) / len(odds)), float(threshold))
