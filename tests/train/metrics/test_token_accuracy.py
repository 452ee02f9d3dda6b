"""Token accuracy counts tokens, never examples, and asks for a task that tells the likeliest ones."""

from __future__ import annotations

import numpy as np
import pytest

from data.errors import UserError
from train import metrics
from train.metrics import Choice


def test_tokens_count_and_not_examples() -> None:
    outputs = {"hits": np.array([1, 0]), "targets": np.array([1, 9])}
    found = metrics.compute([metrics.load(Choice("token_accuracy"))], outputs, "next_tokens")
    assert found == {"token_accuracy": 0.1}
    assert metrics.higher_is_better("validation/token_accuracy")
    with pytest.raises(UserError, match="'token_accuracy' is for next_tokens tasks"):
        metrics.check(Choice("token_accuracy"), "single_label")
