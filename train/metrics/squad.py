"""SQuAD: exact match and F1 of answers, as the official evaluation of versions 1.1 and 2.0 has them, as shares of 1.

Published figures are percentages of the same: 0.8621 here is 86.21 there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from data.section import Section
from train import answers
from train.metrics._counting import total

KINDS: Final = ("answers",)
TAKES: Final = "predictions"
HIGHER_IS_BETTER: Final = True
FIGURES: Final = (
    "exact_match", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1", "best_exact", "best_f1",
    "best_threshold",
)  # fmt: skip


class Options(Section):
    """None."""


def columns() -> tuple[Any, Any]:
    """Return the types of a prediction and of the gold answers, which are none where the context gives no answer."""
    from datasets import List, Value

    text = Value("string")
    return {"text": text, "span": text, "null_odds": Value("float64")}, List(text)


def compute(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Sequence[str]], options: Section
) -> dict[str, float]:
    """Return shares from 0.0 to 1.0 by FIGURES; those after f1 only where some references are without an answer.

    A prediction is {"text": the answer, "" for none; "span": the answer if it had to give one; "null_odds": how much
    the score of no answer is above that of the span}. exact_match and f1, and their parts over questions with
    (HasAns_) and without (NoAns_) an answer, are of the texts. best_exact and best_f1 are what the best threshold on
    the null odds could reach, each its own, chosen on these very rows: no estimate of anything unseen. best_threshold
    is that of best_f1.
    """
    pairs = list(zip(predictions, references, strict=True))
    given = np.array([answers.scores(prediction["text"], golds) for prediction, golds in pairs])
    figures = {name: total(given[:, place]) / len(pairs) for place, name in enumerate(("exact_match", "f1"))}
    has = np.array([len(golds) > 0 for golds in references])
    if has.all():
        return figures
    for part, rows in (("HasAns", has), ("NoAns", ~has)):
        for place, name in enumerate(("exact", "f1")):
            if rows.any():
                figures[f"{part}_{name}"] = total(given[rows, place]) / int(rows.sum())
    spans = np.array([answers.scores(prediction["span"], golds) for prediction, golds in pairs])
    odds = np.array([prediction["null_odds"] for prediction in predictions], dtype=np.float64)
    silent = np.array([answers.scores("", golds)[0] for golds in references])
    exact, f1 = (answers.best(odds, spans[:, place], silent) for place in (0, 1))
    return {**figures, "best_exact": exact.score, "best_f1": f1.score, "best_threshold": f1.threshold}
