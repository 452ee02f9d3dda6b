"""Texts that are written exactly as their references."""

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
    """What counts as the same."""

    ignore_case: bool = Field(False, description="Compare in lower case.")


def compute(predictions: Sequence[str], references: Sequence[str], options: Options) -> dict[str, float]:
    """Return {"exact_match": 0.0 to 1.0} of n texts; blanks between words are compared as one, those around as none."""

    def form(text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if options.ignore_case else text

    hits = sum(form(one) == form(other) for one, other in zip(predictions, references, strict=True))
    return {"exact_match": hits / len(predictions)}
