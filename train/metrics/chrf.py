"""chrF of all texts together, as sacreBLEU computes it (https://github.com/mjpost/sacrebleu): from 0 to 100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pydantic import Field

from data.section import Section
from train.metrics._texts import columns

__all__ = ["columns", "compute"]

KINDS: Final = ("texts",)
TAKES: Final = "predictions"
HIGHER_IS_BETTER: Final = True


class Options(Section):
    """What is counted."""

    word_order: int = Field(0, ge=0, le=4, description="Longest sequence of words counted; 2 is chrF++.")
    lowercase: bool = Field(False, description="Compare in lower case.")


def compute(predictions: Sequence[str], references: Sequence[str], options: Options) -> dict[str, float]:
    """Return {"chrf": 0.0 to 100.0} of n texts, each with one reference."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF(word_order=options.word_order, lowercase=options.lowercase)
    return {"chrf": float(metric.corpus_score([*predictions], [[*references]]).score)}
