"""Accuracy: the share of examples that are right: with several labels, those with all right (subset accuracy)."""

from __future__ import annotations

from typing import Final

from data.section import Section
from train.metrics._counting import Integers

KINDS: Final = ("single_label", "multi_label")
TAKES: Final = "predictions"
HIGHER_IS_BETTER: Final = True


class Options(Section):
    """None."""


def compute(predictions: Integers, references: Integers, options: Options) -> dict[str, float]:
    """Return {"accuracy": 0.0 to 1.0} of (n,) class ids or (n, L) labels."""
    right = predictions == references
    return {"accuracy": float((right.all(axis=1) if right.ndim == 2 else right).mean())}
