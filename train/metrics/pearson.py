"""Pearson's correlation coefficient."""

from __future__ import annotations

from typing import Final

from data.section import Section
from train.metrics._counting import Reals, correlation

KINDS: Final = ("regression",)
TAKES: Final = "predictions"
HIGHER_IS_BETTER: Final = True


class Options(Section):
    """None."""


def compute(predictions: Reals, references: Reals, options: Options) -> dict[str, float]:
    """Return {"pearson": -1.0 to 1.0} of (n,) values; nan where a column is constant or not finite."""
    return {"pearson": correlation(predictions, references)}
