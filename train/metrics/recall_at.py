"""How often the text that belongs to another is among the k most similar to it, and the mean of 1 / its rank."""

from __future__ import annotations

from typing import Annotated, Final

import numpy as np
from pydantic import Field

from data.section import Section
from train.metrics._counting import Reals, total

KINDS: Final = ("pairs",)
TAKES: Final = "more_similar"
AGAINST: Final = "as_similar"
HIGHER_IS_BETTER: Final = True
FIGURES: Final = ("recall_at_*", "mrr")


class Options(Section):
    """How far down one looks."""

    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 5, 10), min_length=1, description="How many are looked at.")


def compute(more: Reals, equal: Reals, options: Options) -> dict[str, float]:
    """Return {"recall_at_K": 0.0 to 1.0} for each k, and "mrr", the mean reciprocal rank.

    more, equal: (n,), how many texts are more similar to each than its own, and how many as similar (its own is one of
    them). Among equals every order is as likely, so a tie is worth the mean over all its orders: a model that makes all
    texts the same finds one in n, not each at rank 1.
    """
    found = {f"recall_at_{k}": total(np.clip((k - more) / equal, 0.0, 1.0)) / len(more) for k in options.k}
    sums = np.concatenate([[0.0], np.cumsum(1 / np.arange(1.0, (more + equal).max() + 1))])  # of 1 + 1/2 + ... + 1/n
    first, last = (values.astype(np.int64) for values in (more, more + equal))
    return {**found, "mrr": total((sums[last] - sums[first]) / equal) / len(more)}
