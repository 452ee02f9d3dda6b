"""Whole groups are held out, the same ones on any machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from benchmarks.split_by import main, shared_out, split
from data.errors import UserError


def test_groups_stay_together_and_every_row_is_kept(tmp_path: Path) -> None:
    rows = [{"title": f"article {number % 30}", "text": str(number)} for number in range(900)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = split(str(tmp_path / "all.jsonl"), "title", tmp_path / "out", {"test": 0.2, "validation": 0.1})
    assert sizes == {"train": 630, "test": 180, "validation": 90}
    parts = {
        role: Dataset.from_parquet(str(tmp_path / "out" / f"{role}.parquet"), cache_dir=str(tmp_path)).to_list()
        for role in sizes
    }
    titles = [{row["title"] for row in part} for part in parts.values()]
    assert sum(map(len, titles)) == len(set().union(*titles)) == 30
    assert sorted(int(row["text"]) for part in parts.values() for row in part) == list(range(900))
    assert all(set(row) == {"title", "text"} for part in parts.values() for row in part)


def test_the_order_of_rows_does_not_matter() -> None:
    groups = [f"g{number % 7}" for number in range(100)]
    assert shared_out(groups, {"test": 0.3}) == shared_out(groups[::-1], {"test": 0.3})
    with pytest.raises(UserError, match="nothing is left to train on: 7 groups of 100 rows"):
        shared_out(groups, {"test": 1.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows.jsonl"], "the following arguments are required: COLUMN, FOLDER"),
        (["rows.jsonl", "titel", "out"], "no column 'titel'; it has title.*did you mean 'title'"),
        (["gone.jsonl", "title", "out"], "there is no file 'gone.jsonl'"),
        (["rows.jsonl", "title", "out", "test"], "'test': the share must be more than 0"),
        (["rows.jsonl", "title", "out", "test=1.5"], "'test=1.5': the share must be"),
        (["rows.jsonl", "title", "out", "dev=0.1"], "'dev=0.1': test=0.2 or validation=0.1"),
        (["rows.jsonl", "title", "out", "test=0.999"], "nothing is left to train on: 2 groups of 2 rows"),
        (["rows.jsonl", "title", "out", "test=.0"], "'test=.0': the share must be more than 0"),
        (["rows.jsonl", "title", "out", "test=0.2", "test=0.3"], "a share is given twice"),
        (["gaps.jsonl", "title", "out"], "gaps.jsonl: 1 rows have no 'title'"),
        (["*s.jsonl", "title", "out"], "the files have not the same columns"),
        (["rows.jsonl", "title", "rows.jsonl"], "rows.jsonl cannot be made: File exists"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_written(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"title": "a"}\n{"title": "b"}\n')
    (tmp_path / "gaps.jsonl").write_text('{"title": "a"}\n{"title": null}\n')
    (tmp_path / "numbers.jsonl").write_text('{"title": 1}\n')
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse
        code = int(error.code or 0)
    assert code == 2 and re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "out").exists()


def test_files_that_are_there_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The source may be one of them: it would lose the rows that are held out."""
    rows = [{"title": f"article {number % 20}"} for number in range(100)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    before = (tmp_path / "train.parquet").read_bytes()
    assert main([str(tmp_path / "train.parquet"), "title", str(tmp_path)]) == 2
    assert "train.parquet is there already" in capsys.readouterr().err
    assert (tmp_path / "train.parquet").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
