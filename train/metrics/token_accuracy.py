"""Token accuracy: the share of a text's tokens that the model finds likeliest, each from those before it."""

from __future__ import annotations

from typing import Final

from data.section import Section
from train.metrics._counting import Reals, total

KINDS: Final = ("next_tokens",)
TAKES: Final = "hits"
AGAINST: Final = "targets"
HIGHER_IS_BETTER: Final = True


class Options(Section):
    """None."""


def compute(hits: Reals, targets: Reals, options: Options) -> dict[str, float]:
    """Return {"token_accuracy": 0.0 to 1.0}: all tokens (n,) that are the likeliest over all tokens (n,)."""
    return {"token_accuracy": total(hits) / total(targets)}
