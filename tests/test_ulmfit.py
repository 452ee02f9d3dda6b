"""The ablation's table: the best learning rate of each row, and a run that did not finish is said, not counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ulmfit
from data.errors import UserError


def test_a_row_is_shown_at_its_best_rate() -> None:
    found = {"1e-3": [0.5, 0.7, 0.6], "3e-4": [0.6, 0.75, 0.6]}
    assert ulmfit.row("all", found) == "| all | 3e-4 | 0.6500 | 0.1500 | 0.6000 0.7500 0.6000 |"
    assert ulmfit.row("all", {"": [0.5]}) == "| all | the config's | 0.5000 | 0.0000 | 0.5000 |"


def test_a_run_that_fails_ends_the_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did not finish.*\n.*nowhere.yaml.*\n.*error: "):
        ulmfit.train([tmp_path / "nowhere.yaml"])
