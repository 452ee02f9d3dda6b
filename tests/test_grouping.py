"""Batches of similar length (`data.grouping: window`): the same on any cut and world, and after a stop in a window."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import figures
from tests.distributed import launch
from tests.test_resume import weights
from tests.worker import carry_out
from train.__main__ import main

MakeConfig = Callable[..., dict[str, Any]]
GROUPED: dict[str, Any] = {"data__grouping": "window", "data__window": 3}


def taken(record: Path) -> list[list[int]]:
    return [sorted(json.loads(line)[1]) for line in record.read_text().splitlines()]


@pytest.mark.whole_run
def test_neither_the_cut_nor_the_processes_nor_a_stop_matter(make_config: MakeConfig, tmp_path: Path) -> None:
    """Five updates an epoch, the last of 22 examples: a window of three and one of two. Stopped in the first of each
    world after update 7, the second of a window."""
    places = {"one": {"micro_batch_size": 7}, "two": {}, "moved": {}}
    configs = {
        name: make_config(**GROUPED, **cut, updates=11, output=str(tmp_path / name)) for name, cut in places.items()
    }
    dropout: dict[str, Any] = {**GROUPED, "precision": "fp32", "model__config": {}, "micro_batch_size": 11}
    steady, stopped = (make_config(**dropout, updates=11, output=str(tmp_path / name)) for name in ("s", "t"))
    records = {name: tmp_path / f"{name}.jsonl" for name in places}
    launch(
        [
            {"config": configs["two"], "record": str(records["two"])},
            {"config": configs["moved"], "record": str(records["moved"]), "stop_after": 7},
            {"config": steady},
            {"config": stopped, "stop_after": 7},
            {"config": stopped},
        ],
        2,
        tmp_path,
    )
    for name in ("one", "moved"):
        assert carry_out(configs[name], record=str(records[name])) == 0
    batches = taken(records["one"])
    losses = list(figures(tmp_path / "one", "train/loss").values())
    assert [len(batch) for batch in batches] == [32, 32, 32, 32, 22] * 2 + [32]
    for epoch in (batches[:5], batches[5:10]):
        assert sorted(np.concatenate(epoch)) == list(range(150))
    for name in ("two", "moved"):
        assert taken(records[name]) == batches
        assert list(figures(tmp_path / name, "train/loss").values()) == pytest.approx(losses, rel=1e-9)
    assert weights(tmp_path / "t") == weights(tmp_path / "s")
    plain = make_config(updates=11, output=str(tmp_path / "plain"))
    record = tmp_path / "plain.jsonl"
    assert carry_out(plain, record=str(record)) == 0
    assert sorted(np.concatenate(taken(record)[:3])) == sorted(np.concatenate(batches[:3]))
    assert taken(record)[:3] != batches[:3] and taken(record)[4] == batches[4]


def test_what_is_said_and_what_is_refused(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**GROUPED, updates=1)
    assert carry_out(config) == 0
    said = capsys.readouterr().out
    assert "plan    1 updates of 32 examples, 5 an epoch, of similar length within windows of 3 updates; " in said
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({**config, "output": str(tmp_path / "other")}))
    assert main([str(file), "data.streaming=true"]) == 2
    assert "data.grouping: window sorts the rows of many updates" in capsys.readouterr().err
    file.write_text(json.dumps({**config, "updates": 2}))
    assert main([str(file), "data.grouping=none"]) == 2
    assert "data.grouping: window → none" in capsys.readouterr().err
