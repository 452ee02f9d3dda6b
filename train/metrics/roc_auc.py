"""Area under the ROC curve: how often a positive example scores higher than a negative one; equal scores count half."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from data.section import Section
from train.metrics._counting import Integers, Reals, average_ranks

KINDS: Final = ("single_label", "multi_label")
TAKES: Final = "scores"
HIGHER_IS_BETTER: Final = True


class Options(Section):
    """How columns are averaged where there is more than one; auto is macro, and the result name has no suffix."""

    average: Literal["auto", "micro", "macro", "weighted"] = "auto"


def compute(scores: Reals, references: Integers, options: Options) -> dict[str, float]:
    """Return {"roc_auc" or "roc_auc_<average>": 0.0 to 1.0} of (n, C) scores and (n,) class ids, or (n, L) and (n, L).

    Two classes: the area of class 1, whatever the average. More: each class against the rest, then averaged (weighted:
    by how often the class is true; micro: all columns as one). Several labels: the same over columns. A column with
    only one outcome has no area: macro and weighted leave it out. nan where nothing is left, or where a score is nan.
    """
    name = "roc_auc" if options.average == "auto" else f"roc_auc_{options.average}"
    if np.isnan(scores).any():
        return {name: float("nan")}
    if references.ndim == 1 and scores.shape[1] == 2:
        return {name: _area(scores[:, 1], references == 1)}
    positive = references == 1 if references.ndim == 2 else references[:, None] == np.arange(scores.shape[1])
    if options.average == "micro":
        return {name: _area(scores.ravel(), positive.ravel())}
    areas = np.array([_area(scores[:, column], positive[:, column]) for column in range(scores.shape[1])])
    defined = ~np.isnan(areas)
    if not defined.any():
        return {name: float("nan")}
    weights = positive.sum(axis=0)[defined] if options.average == "weighted" else None
    return {name: float(np.average(areas[defined], weights=weights))}


def _area(scores: Reals, positive: NDArray[np.bool_]) -> float:
    """Return the area from the rank sum (Mann and Whitney's U), rounded once; nan where there is only one outcome."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return float("nan")
    above = average_ranks(scores)[positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))
