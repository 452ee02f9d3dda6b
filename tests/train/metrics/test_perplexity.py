"""Perplexity against its definition over single tokens, on many random cases; the same in any order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from data.errors import UserError
from train import metrics
from train.metrics import Choice


def figure(losses: Any, targets: Any, kind: Any = "next_tokens") -> float:
    outputs = {"losses": np.asarray(losses), "targets": np.asarray(targets)}
    return metrics.compute([metrics.load(Choice("perplexity"))], outputs, kind)["perplexity"]


def test_it_is_the_inverse_geometric_mean_of_the_tokens_probabilities() -> None:
    rng = np.random.default_rng(0)
    metric = metrics.load(Choice("perplexity"))
    for _ in range(1_000):
        examples = [rng.random(rng.integers(1, 9)) * 0.98 + 0.01 for _ in range(rng.integers(1, 12))]
        losses = np.array([-np.log(example).sum() for example in examples])
        targets = np.array([len(example) for example in examples])
        tokens = [float(probability) for example in examples for probability in example]
        expected = math.prod(tokens) ** (-1 / len(tokens))
        found = metrics.compute([metric], {"losses": losses, "targets": targets}, "masked_tokens")
        assert found == {"perplexity": pytest.approx(expected, rel=1e-9)}
        order = rng.permutation(len(losses))
        assert metrics.compute([metric], {"losses": losses[order], "targets": targets[order]}, "masked_tokens") == found


def test_tokens_count_and_not_examples() -> None:
    """One example of one token and one of nine: a mean of means would be far off."""
    losses, targets = [math.log(100.0), 9 * math.log(2.0)], [1, 9]
    assert figure(losses, targets) == pytest.approx((100.0 * 2.0**9) ** 0.1, rel=1e-12)
    assert figure(np.float32([9 * math.log(7.0)]), [9]) == pytest.approx(7.0, rel=1e-6)
    assert figure([0.0, 0.0], [3, 4]) == 1.0


def test_a_model_that_has_diverged_does_not_stop_the_run() -> None:
    assert figure([1e6], [1]) == math.inf
    assert math.isnan(figure([math.nan, 1.0], [1, 1]))


def test_lower_is_better_and_other_tasks_are_refused() -> None:
    assert not metrics.higher_is_better("validation/perplexity")
    with pytest.raises(UserError, match="'perplexity' is for masked_tokens and next_tokens tasks, this one is single"):
        metrics.check(Choice("perplexity"), "single_label")
    with pytest.raises(UserError, match="there are no examples to evaluate"):
        figure([], [])


def test_through_the_interface_of_evaluate() -> None:
    metric = metrics.load(Choice("perplexity"))
    given = {"predictions": [math.log(4.0), 2 * math.log(4.0)], "references": [1, 2]}
    assert metric.compute(**given)["perplexity"] == pytest.approx(4.0, rel=1e-12)
