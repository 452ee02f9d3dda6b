"""BLEU of all texts together, as sacreBLEU computes it (https://github.com/mjpost/sacrebleu): from 0 to 100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from pydantic import Field

from data.section import Section
from train.metrics._texts import columns

__all__ = ["columns", "compute"]

KINDS: Final = ("texts",)
TAKES: Final = "predictions"
HIGHER_IS_BETTER: Final = True


class Options(Section):
    """How texts become words."""

    tokenize: Literal["13a", "intl", "char", "zh", "none"] = Field(
        "13a",
        description="sacreBLEU's name of it: 13a and intl for languages that write blanks, zh for Chinese, char for "
        "single characters, none for texts that are tokenized already.",
    )
    lowercase: bool = Field(False, description="Compare in lower case.")


def compute(predictions: Sequence[str], references: Sequence[str], options: Options) -> dict[str, float]:
    """Return {"bleu": 0.0 to 100.0} of n texts, each with one reference."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=options.tokenize, lowercase=options.lowercase, force=True)
    return {"bleu": float(metric.corpus_score([*predictions], [[*references]]).score)}
