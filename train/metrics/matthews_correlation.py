"""Matthews' correlation coefficient, for two classes or more (R_K of Gorodkin, https://doi.org/10.1016/j.compbiolchem.2004.09.006)."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from data.section import Section
from train.metrics._counting import Integers

KINDS: Final = ("single_label",)
TAKES: Final = "predictions"
HIGHER_IS_BETTER: Final = True


class Options(Section):
    """None."""


def compute(predictions: Integers, references: Integers, options: Options) -> dict[str, float]:
    """Return {"matthews_correlation": -1.0 to 1.0} of (n,) class ids; 0.0 where either column holds one class only."""
    examples = len(references)
    labels = int(max(predictions.max(), references.max())) + 1
    predicted, actual = (np.bincount(ids, minlength=labels) for ids in (predictions, references))
    # Python integers from here: the product of the two spreads is of the order of examples**4 and would overflow.
    right = int((predictions == references).sum())
    covariance = right * examples - int(predicted @ actual)
    spread = (examples**2 - int(predicted @ predicted)) * (examples**2 - int(actual @ actual))
    return {"matthews_correlation": covariance / math.sqrt(spread) if spread else 0.0}
