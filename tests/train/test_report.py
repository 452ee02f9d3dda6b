"""The model card: what stands in it beside the figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from train import report
from train.config import validate
from train.tasks.causal_lm import CausalLanguageModelling, Config


def test_what_a_user_has_to_know_stands_in_the_card(make_config: Callable[..., dict[str, Any]]) -> None:
    config = validate(make_config(task={"name": "causal_lm"}), "test")
    cards = []
    for hint in ("", "Begin with <start>."):
        task = CausalLanguageModelling(Config(), "text", 1, 2, 0, hint=hint)
        cards.append(report.card(config, {"validation/loss": 1.5}, task, updates=3, own_code=False))
    assert "Begin with <start>.\n" in cards[1] and "| validation/loss | 1.5000 |" in cards[1]
    assert cards[0] == cards[1].replace("\nBegin with <start>.\n", "")
