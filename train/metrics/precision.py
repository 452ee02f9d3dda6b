"""Precision: the share of what was predicted that is true."""

from __future__ import annotations

from typing import Final

from train.metrics._counting import Averaging, Integers, Reals, averaged, divide

KINDS: Final = ("single_label", "multi_label")
TAKES: Final = "predictions"
HIGHER_IS_BETTER: Final = True
Options = Averaging


def compute(predictions: Integers, references: Integers, options: Averaging) -> dict[str, float]:
    """Return {"precision" or "precision_<average>": 0.0 to 1.0} of (n,) class ids or (n, L) labels."""
    return averaged("precision", predictions, references, options, _precision)


def _precision(hits: Integers, predicted: Integers, actual: Integers) -> Reals:
    return divide(hits, predicted)
