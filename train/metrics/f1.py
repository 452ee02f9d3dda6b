"""F1: the harmonic mean of precision and recall."""

from __future__ import annotations

from typing import Final

from train.metrics._counting import Averaging, Integers, Reals, averaged, divide

KINDS: Final = ("single_label", "multi_label")
TAKES: Final = "predictions"
HIGHER_IS_BETTER: Final = True
Options = Averaging


def compute(predictions: Integers, references: Integers, options: Averaging) -> dict[str, float]:
    """Return {"f1" or "f1_<average>": 0.0 to 1.0} of (n,) class ids or (n, L) labels."""
    return averaged("f1", predictions, references, options, _f1)


def _f1(hits: Integers, predicted: Integers, actual: Integers) -> Reals:
    return divide(2 * hits, predicted + actual)
