"""What growth is measured on: sizes that differ in nothing else, and take turns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.growth import in_turn, rows
from train.config import validate


def test_every_second_turn_goes_backwards() -> None:
    """Of three sizes: 10, 20, 30, then 31, 21, 11."""
    seen = np.array([10, 20, 30, 31, 21, 11, 12, 22, 32])
    assert in_turn.sorted_by_size(seen, 3).tolist() == [[10, 20, 30], [11, 21, 31], [12, 22, 32]]
    assert seen[3] == 31


def test_sizes_have_the_same_lengths_and_other_tokens(tmp_path: Path) -> None:
    """Each thousand rows of a size, but for its order; the lengths are not all alike."""
    found = []
    for size in (1_000, 3_000):
        rows.lay(tmp_path, size)
        encoded = rows.opened(validate(rows.config(tmp_path, size, tmp_path / "run", 1), "growth"))
        lengths = encoded.lengths(np.arange(size)).reshape(-1, 1_000)
        assert (lengths == lengths[0]).all()
        features = encoded.features(np.arange(size - 2, size))
        assert [len(ids) for ids in features["input_ids"]] == features["length"].tolist()
        found.append((lengths[0].tolist(), features["input_ids"][0].tolist()))
    (lengths, tokens), (others, other_tokens) = found
    assert lengths == others and len(set(lengths)) > 10
    assert tokens != other_tokens


@pytest.mark.whole_run
def test_sizes_take_turns_in_one_run(tmp_path: Path) -> None:
    """A line for each size: tokens/s, its part of the first one's, tokens an update, the wait for its batch."""
    sizes = [10**3, 10**4]
    for size in sizes:
        rows.lay(tmp_path, size)
    lines = [line.strip("|").split("|") for line in in_turn.measure(tmp_path, sizes, 2)]
    small, large = ([each.strip() for each in line] for line in lines[2:4])
    assert small[0] == "10^3" and large[0] == "10^4" and small[2] == "1.000 (1.000 to 1.000)"
    for speed, _, tokens, waited in (small[1:], large[1:]):
        assert float(speed.replace(",", "")) > 0
        assert 300 < float(tokens) < 700  # of 32 rows
        assert 0 < float(waited.rstrip("%")) < 50
    assert lines[4][0].strip() == "highest / lowest - 1"
