"""What several metrics share: counts for each label and their averages, ranks, correlation, sums without an order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data.errors import UserError
from data.section import Section

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]

# (hits, predicted, actual), each (L,): how often a label was rightly predicted, predicted, and true → (L,) floats
Ratio = Callable[[Integers, Integers, Integers], Reals]


class Averaging(Section):
    """The options of F1, precision and recall.

    auto      binary when there are exactly two classes (the scores or `classes` tell), else macro; no suffix to name
    binary    of the class `positive` alone, against all others
    micro     of the counts summed over labels
    macro     mean over labels: those seen in references or predictions (single label), all columns (multi-label)
    weighted  the same mean, weighted by how often the label is true
    """

    average: Literal["auto", "binary", "micro", "macro", "weighted"] = "auto"
    positive: int = Field(1, ge=0, description="class id that average binary is about")
    classes: int | None = Field(None, ge=2, description="number of classes; left out, the scores tell it")

    @model_validator(mode="after")
    def _positive_has_effect(self) -> Averaging:
        if "positive" in self.model_fields_set and self.average not in ("auto", "binary"):
            raise ValueError(f"positive has no effect with average {self.average}; leave it out or set average: binary")
        return self


def averaged(
    name: str, predictions: Integers, references: Integers, options: Averaging, ratio: Ratio
) -> dict[str, float]:
    """Return {name: figure}, or {name_average: figure} where the average was chosen; a division by zero gives 0.0.

    predictions, references: (n,) class ids or (n, L) labels of 0 and 1. Raises UserError for options that do not fit.
    """
    multi_label, classes = predictions.ndim == 2, options.classes
    average: str = options.average
    if average == "auto":
        average = "binary" if classes == 2 and not multi_label else "macro"
    if average == "binary" and multi_label:
        raise UserError(f"metric {name!r}: average binary is about one class; for labels take micro, macro or weighted")
    if average == "binary" and classes is not None and options.positive >= classes:
        raise UserError(f"metric {name!r}: positive is {options.positive}; allowed are 0 to {classes - 1}")
    if average == "macro" and "positive" in options.model_fields_set:
        raise UserError(
            f"metric {name!r}: positive has no effect unless there are exactly two classes; "
            "set average: binary, or leave it out"
        )
    hits, predicted, actual = _counts(predictions, references)
    if average == "binary":
        label = slice(options.positive, options.positive + 1)  # empty where that class was never seen
        value = float(ratio(hits[label], predicted[label], actual[label]).sum())
    elif average == "micro":
        value = float(ratio(*(count.sum(keepdims=True) for count in (hits, predicted, actual)))[0])
    else:
        ratios = ratio(hits, predicted, actual)
        seen = np.ones(len(hits)) if multi_label else (predicted + actual > 0).astype(np.float64)
        weights = actual if average == "weighted" else seen
        value = float(divide(np.asarray([(ratios * weights).sum()]), np.asarray([weights.sum()]))[0])
    return {name if options.average == "auto" else f"{name}_{average}": value}


def divide(above: NDArray[np.number], below: NDArray[np.number]) -> Reals:
    """Return above / below, (L,), with 0.0 where below is 0."""
    quotient: Reals = np.divide(above, below, out=np.zeros(len(below)), where=below != 0)
    return quotient


def _counts(predictions: Integers, references: Integers) -> tuple[Integers, Integers, Integers]:
    if predictions.ndim == 2:
        return (predictions * references).sum(axis=0), predictions.sum(axis=0), references.sum(axis=0)
    labels = int(max(predictions.max(), references.max())) + 1
    hits = np.bincount(references[predictions == references], minlength=labels)
    return hits, np.bincount(predictions, minlength=labels), np.bincount(references, minlength=labels)


def total(values: Reals) -> float:
    """Return the sum of (n,) values, the same to the last bit in whatever order they come: evaluation has no order."""
    return float(np.sort(values).sum())


def average_ranks(values: Reals) -> Reals:
    """Return the ranks of (n,) values, 1 to n; equal values share the mean of theirs, exactly."""
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Reals = (np.cumsum(counts) - (counts - 1) / 2)[position]
    return ranks


def correlation(left: Reals, right: Reals) -> float:
    """Return Pearson's r of two (n,) columns; nan where one is constant or not finite (and so for n = 1)."""
    for column in (left, right):
        if not np.isfinite(column).all() or column.min() == column.max():
            return float("nan")
    return float(np.clip(total(_standardized(left) * _standardized(right)), -1.0, 1.0))


def _standardized(values: Reals) -> Reals:
    """Return the values, which are not all equal, shifted and scaled to mean 0 and length 1."""
    scaled = np.ldexp(values, -np.frexp(np.abs(values).max())[1])  # exact, and nothing below can overflow
    centered = scaled - total(scaled) / len(scaled)
    centered = centered / np.abs(centered).max()
    standardized: Reals = centered / np.sqrt(total(centered**2))
    return standardized
