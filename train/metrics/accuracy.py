"""Accuracy: the share of examples, words or hidden tokens that are right; several labels: all of them right."""

from __future__ import annotations

from typing import Final

from data.section import Section
from train.metrics._counting import Integers

KINDS: Final = ("single_label", "multi_label", "tags", "entities", "masked_tokens")
TAKES: Final = "predictions"
HIGHER_IS_BETTER: Final = True


class Options(Section):
    """None."""


def compute(predictions: Integers, references: Integers, options: Options) -> dict[str, float]:
    """Return {"accuracy": 0.0 to 1.0} of (n,) class or token ids (-1: no prediction) or (n, L) labels."""
    right = predictions == references
    return {"accuracy": float((right.all(axis=1) if right.ndim == 2 else right).mean())}
