"""Recall at k and the mean reciprocal rank, ties among them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data.errors import UserError
from train import metrics
from train.metrics import Choice


def test_ties_are_worth_the_mean_over_all_their_orders() -> None:
    more, equal = np.array([0, 0, 2, 7]), np.array([1, 3, 2, 1])
    ranks = [
        [above + 1 + order.index(0) for order in itertools.permutations(range(same))]
        for above, same in zip(more, equal, strict=True)
    ]
    metric = metrics.load(metrics.parse({"name": "recall_at", "k": [1, 3]}))
    found = metrics.compute([metric], {"more_similar": more, "as_similar": equal}, "pairs")
    expected = {
        f"recall_at_{k}": np.mean([np.mean([rank <= k for rank in several]) for several in ranks]) for k in (1, 3)
    }
    expected["mrr"] = np.mean([np.mean([1 / rank for rank in several]) for several in ranks])
    assert found == pytest.approx(expected, rel=1e-12)


def test_what_it_is_for_and_what_it_reports() -> None:
    with pytest.raises(UserError, match="'recall_at' is for pairs tasks, this one is regression"):
        metrics.check(Choice("recall_at"), "regression")
    with pytest.raises(UserError, match="'recall_at': k"):
        metrics.parse({"name": "recall_at", "k": [0]})
    metrics.check_best("recall_at_10", metrics.figures(Choice("recall_at")))
    with pytest.raises(UserError, match="no metric of this config reports 'accuracy'"):
        metrics.check_best("accuracy", metrics.figures(Choice("recall_at")))
    assert metrics.higher_is_better("validation/recall_at_10") and metrics.higher_is_better("mrr")
