"""How often, and by how much, the chosen answer has the higher reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from data.section import Section
from train.metrics._counting import total
from train.metrics._pairs import columns

__all__ = ["columns", "compute"]

KINDS: Final = ("preferences", "rewards")
TAKES: Final = "rewards"
AGAINST: Final = "rewards"
HIGHER_IS_BETTER: Final = True
FIGURES: Final = ("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward")


class Options(Section):
    """None."""


def compute(rewards: Sequence[Any], _: Sequence[Any], options: Section) -> dict[str, float]:
    """Return means over n pairs of rewards, (n, 2), chosen first, by FIGURES; equal rewards are no hit.

    A reward is what the task says: beta x log-probability against the starting model (dpo, ipo), beta x mean
    log-probability (orpo), or a score. nan in any pair makes a nan of all but the accuracy, where it is no hit.
    """
    chosen, rejected = np.asarray(rewards, dtype=np.float64).T
    count = len(chosen)
    return {
        "reward_accuracy": int(np.count_nonzero(chosen > rejected)) / count,
        "reward_margin": total(chosen - rejected) / count,
        "chosen_reward": total(chosen) / count,
        "rejected_reward": total(rejected) / count,
    }
