"""Spearman's rank correlation: Pearson's of the ranks, where equal values share the mean of their ranks."""

from __future__ import annotations

from typing import Final

import numpy as np

from data.section import Section
from train.metrics._counting import Reals, average_ranks, correlation

KINDS: Final = ("regression",)
TAKES: Final = "predictions"
HIGHER_IS_BETTER: Final = True


class Options(Section):
    """None."""


def compute(predictions: Reals, references: Reals, options: Options) -> dict[str, float]:
    """Return {"spearman": -1.0 to 1.0} of (n,) values; nan where a column is constant or holds a nan."""
    if np.isnan(predictions).any() or np.isnan(references).any():
        return {"spearman": float("nan")}
    return {"spearman": correlation(average_ranks(predictions), average_ranks(references))}
