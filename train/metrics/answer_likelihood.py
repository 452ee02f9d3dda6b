"""How likely the chosen and the rejected answers are: both tend to fall in preference training, which this shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from data.section import Section
from train.metrics._counting import total
from train.metrics._pairs import columns

__all__ = ["columns", "compute"]

KINDS: Final = ("preferences",)
TAKES: Final = "logps"
AGAINST: Final = "logps"
HIGHER_IS_BETTER: Final = True
FIGURES: Final = ("chosen_logp", "rejected_logp")


class Options(Section):
    """None."""


def compute(logps: Sequence[Any], _: Sequence[Any], options: Section) -> dict[str, float]:
    """Return the mean over n pairs of the log-probabilities of whole answers, in nats, (n, 2), by FIGURES."""
    chosen, rejected = np.asarray(logps, dtype=np.float64).T
    return {"chosen_logp": total(chosen) / len(chosen), "rejected_logp": total(rejected) / len(rejected)}
