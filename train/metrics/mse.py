"""Mean squared error."""

from __future__ import annotations

from typing import Final

import numpy as np

from data.section import Section
from train.metrics._counting import Reals, total

KINDS: Final = ("regression",)
TAKES: Final = "predictions"
HIGHER_IS_BETTER: Final = False


class Options(Section):
    """None."""


def compute(predictions: Reals, references: Reals, options: Options) -> dict[str, float]:
    """Return {"mse": 0.0 or more} of (n,) values, in the square of their unit; inf or nan once a model has diverged."""
    with np.errstate(over="ignore", invalid="ignore"):
        return {"mse": total((predictions - references) ** 2) / len(references)}
