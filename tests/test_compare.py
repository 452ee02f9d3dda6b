"""The bench against peers: the same rows for all, and figures that mean what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from benchmarks.compare import figures, workloads
from benchmarks.compare.workloads import WORKLOADS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["sst2-minilm", "imdb-minilm"])
def test_rows_have_the_lengths_of_real_ones(name: str, tmp_path: Path) -> None:
    """Each word is one token, so that the tokenizer gives back the lengths that were drawn."""
    work = WORKLOADS[name]
    drawn = workloads.draw(work)
    assert len(drawn) == work.rows and np.array_equal(drawn, workloads.draw(work))
    rows = [json.loads(line) for line in workloads.write_rows(work, tmp_path).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(workloads.minilm())
    found = [len(ids) for ids in tokenizer([row["text"] for row in rows]).input_ids]
    assert found == np.maximum(drawn, 3).tolist()
    assert {row["label"] for row in rows} == {"good", "bad"}


@pytest.mark.parametrize(("name", "mean"), [("sst2", 13.32), ("imdb", 274.9), ("chat", 240.8)])
def test_lengths_are_those_that_are_said(name: str, mean: float) -> None:
    tokens, rows = np.loadtxt(workloads.LENGTHS / f"{name}.txt").T
    assert np.average(tokens, weights=rows) == pytest.approx(mean, rel=1e-3)


def test_work() -> None:
    """BERT-base at 128 tokens: 525 million operations a token (docs of the field: 85.1 M parameters in its layers)."""
    shape: Any = AutoConfig.for_model("bert", **workloads.SHAPES["bert-base"])
    total = workloads.flops(WORKLOADS["sst2-bert-base"], shape, np.full(4, 128))
    assert total / (4 * 128) == pytest.approx(525e6, rel=0.01)


def test_ratios() -> None:
    """Round by round; the interval of equal rounds is a point, of unequal ones it holds the median."""
    assert figures.ratio([2.0] * 5, [1.0] * 5) == (2.0, 2.0, 2.0)
    median, low, high = figures.ratio([2.0, 2.2, 1.8, 2.1, 1.9], [1.0] * 5)
    assert 1.8 <= low < median == 2.0 < high <= 2.2


def test_table() -> None:
    told = {
        "tokens": 100,
        "seconds": 2.0,
        "efficiency": 0.5,
        "memory": 300.0,
        "first_update": 4.0,
        "losses": [1.0, 0.5],
    }
    lines = figures.table({"ours": [told], "slow": [{**told, "seconds": 4.0}]}, work_per_token=1e6, best_matmul=1e9)
    assert lines[2] == "| ours | 50 | 1.00 (1.00 to 1.00) | 0.50 | 0.05 | 300 MB | 4.0 s | 0.7500 |"
    assert lines[3].startswith("| slow | 25 | 2.00 (2.00 to 2.00) |")


@pytest.mark.slow
def test_all_peers_learn_the_same_rows(tmp_path: Path) -> None:
    command = ["-m", "benchmarks.compare", "--suite", "toy", "--rounds", "1", "--results", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = {peer: rounds[0] for peer, rounds in json.loads((tmp_path / "toy.json").read_text()).items()}
    assert set(told) == {"ours", "raw", "trainer", "trainer_tuned", "usual"}
    assert all(each["updates"] == WORKLOADS["toy"].updates and each["seconds"] > 0 for each in told.values())
    assert told["ours"]["tokens"] == told["raw"]["tokens"]
    assert told["ours"]["losses"] == pytest.approx(told["raw"]["losses"], rel=1e-5)
    assert "| usual |" in (tmp_path / "toy.md").read_text()
