"""ROUGE-1, -2, -L and -Lsum (https://aclanthology.org/W04-1013), F1 as the package rouge-score has it, unstemmed.

Words are what is left of a text in lower case when all but a-z and 0-9 becomes blank: made for English.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np

from data.section import Section
from train.metrics._counting import total
from train.metrics._texts import columns

__all__ = ["columns", "compute"]

KINDS: Final = ("texts",)
TAKES: Final = "predictions"
HIGHER_IS_BETTER: Final = True
FIGURES: Final = ("rouge1", "rouge2", "rougeL", "rougeLsum")

Words = list[str]
NO_WORD = re.compile("[^a-z0-9]+")


class Options(Section):
    """None."""


def compute(predictions: Sequence[str], references: Sequence[str], options: Section) -> dict[str, float]:
    """Return the mean over n texts, 0.0 to 1.0, by FIGURES. rougeLsum takes each line for a sentence."""
    pairs = zip(predictions, references, strict=True)
    found = np.array([_scores(prediction, reference) for prediction, reference in pairs])
    return {name: total(found[:, place]) / len(found) for place, name in enumerate(FIGURES)}


def _scores(prediction: str, reference: str) -> tuple[float, float, float, float]:
    given, gold = _words(prediction), _words(reference)
    lines, gold_lines = ([_words(line) for line in text.split("\n") if line] for text in (prediction, reference))
    longest = len(_common(gold, given))
    return (
        _ngrams(given, gold, 1),
        _ngrams(given, gold, 2),
        _f1(longest, len(given), len(gold)),
        _f1(_union(lines, gold_lines), sum(map(len, lines)), sum(map(len, gold_lines))),
    )


def _words(text: str) -> Words:
    return NO_WORD.sub(" ", text.lower()).split()


def _ngrams(given: Words, gold: Words, size: int) -> float:
    one, other = (Counter(zip(*(words[at:] for at in range(size)), strict=False)) for words in (given, gold))
    return _f1((one & other).total(), one.total(), other.total())


def _f1(hits: int, given: int, gold: int) -> float:
    if not hits:
        return 0.0
    precision, recall = hits / given, hits / gold
    return 2 * precision * recall / (precision + recall)


def _common(gold: Words, given: Words) -> list[int]:
    """Return the places in `gold` of a longest common subsequence; of several the one that rouge-score takes."""
    table = [[0] * (len(given) + 1)]
    for word in gold:
        above, row = table[-1], [0]
        for place, other in enumerate(given):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[-1]))
        table.append(row)
    found, first, second = [], len(gold), len(given)
    while first and second:
        if gold[first - 1] == given[second - 1]:
            first, second = first - 1, second - 1
            found.append(first)
        elif table[first][second - 1] > table[first - 1][second]:
            second -= 1
        else:
            first -= 1
    return found


def _union(lines: list[Words], gold_lines: list[Words]) -> int:
    """Return the words of the reference's lines that a longest common subsequence with any line holds, each counted as
    often as both texts have it."""
    left, gold_left = (Counter(word for words in each for word in words) for each in (lines, gold_lines))
    hits = 0
    for gold in gold_lines:
        for place in sorted({place for line in lines for place in _common(gold, line)}):
            word = gold[place]
            if left[word] > 0 and gold_left[word] > 0:
                hits += 1
                left[word] -= 1
                gold_left[word] -= 1
    return hits
