"""What each round of the benchmarks gave, and what the tables say of it."""

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.compare.figures import interval, ratio

FOLDER = Path(__file__).parents[1] / "benchmarks"
RATIO = re.compile(r"(\d+\.\d+) \((\d+\.\d+) to (\d+\.\d+)")


def test_the_ratios_in_the_tables_are_those_of_the_rounds() -> None:
    """Medians, and the intervals: to 0.01, since speeds are kept as whole numbers. Of SST-2 all rounds together too."""
    said = np.array(RATIO.findall((FOLDER / "README.md").read_text("utf-8")), dtype=float)
    measured = defaultdict[tuple[str, ...], dict[str, list[int]]](lambda: defaultdict(list))
    with (FOLDER / "rounds.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            speeds = measured[row["workload"], row["precision"], row["commit"], row["hardware"]]
            speeds[row["peer"]].append(int(row["real_tokens_per_second"]))
            assert int(row["round"]) == len(speeds[row["peer"]])
    together = defaultdict[tuple[str, str], list[float]](list)
    for (workload, precision, *where), speeds in measured.items():
        ours, *peers = speeds
        assert ours == "ours"
        for peer in peers:
            assert stands(said, ratio(speeds[ours], speeds[peer])), (workload, precision, *where, peer)
            if workload == "sst2-minilm" and peer in ("raw", "trainer"):
                together[precision, peer] += np.divide(speeds[ours], speeds[peer]).tolist()
    assert {name: len(ratios) for name, ratios in together.items()} == {
        ("bf16", "raw"): 18, ("bf16", "trainer"): 31, ("fp32", "raw"): 21, ("fp32", "trainer"): 21
    }  # fmt: skip
    for name, ratios in together.items():
        assert stands(said, interval(ratios)), name


def stands(said: np.ndarray, found: tuple[float, float, float]) -> bool:
    return bool((np.abs(said - np.array(found)).max(axis=1) < 0.0151).any())
