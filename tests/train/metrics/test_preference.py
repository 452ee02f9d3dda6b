"""Figures of pairs: by hand, whatever the order, and only for the tasks that have them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data.errors import UserError
from train import metrics
from train.metrics import Choice


def figures(name: str, entry: str, values: list[list[float]]) -> dict[str, float]:
    return metrics.compute([metrics.load(Choice(name))], {entry: values}, "preferences")


def test_rewards_by_hand() -> None:
    values = [[1.0, 0.5], [0.0, 0.0], [-1.0, 2.0], [3.0, 1.0]]
    expected = {"reward_accuracy": 0.5, "reward_margin": -0.125, "chosen_reward": 0.75, "rejected_reward": 0.875}
    assert figures("preference", "rewards", values) == expected
    assert metrics.load(Choice("preference")).compute(predictions=values, references=values) == expected
    assert figures("answer_likelihood", "logps", values) == {"chosen_logp": 0.75, "rejected_logp": 0.875}
    broken = figures("preference", "rewards", [[math.nan, 1.0], [1.0, 0.0]])
    assert broken["reward_accuracy"] == 0.5 and math.isnan(broken["reward_margin"])


def test_the_order_of_pairs_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 2)) * 10.0 ** rng.integers(-6, 6, (500, 1))
    for name, entry in (("preference", "rewards"), ("answer_likelihood", "logps")):
        expected = figures(name, entry, values.tolist())
        for _ in range(5):
            assert figures(name, entry, rng.permutation(values).tolist()) == expected


def test_a_reward_model_has_no_likelihoods() -> None:
    metrics.check(Choice("preference"), "rewards")
    with pytest.raises(
        UserError, match=r"'answer_likelihood' is for preferences tasks, this one is rewards; .* fit: pr"
    ):
        metrics.check(Choice("answer_likelihood"), "rewards")
    reported = metrics.reported([Choice("preference")])
    metrics.check_best("reward_accuracy", reported)
    assert metrics.higher_is_better("validation/reward_accuracy")
    with pytest.raises(UserError, match="no metric of this config reports 'chosen_logp'"):
        metrics.check_best("chosen_logp", reported)
