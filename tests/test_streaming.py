"""Streamed runs, whole: one result for every number of processes, and for every stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from tests.conftest import figures, rows
from tests.distributed import launch
from tests.worker import carry_out
from train import ingredients
from train.config import validate


@pytest.fixture
def streamed(tmp_path: Path, make_config: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A run of 12 updates over 2.6 passes of five shards, with a row that cannot be used."""

    def make(output: str, **changes: Any) -> dict[str, Any]:
        for shard in range(5):
            lines = [json.dumps(row) + "\n" for row in rows("single_label", 30, shard)]
            lines[20] = '{"text": "", "label": "low"}\n' if shard == 3 else lines[20]
            (tmp_path / f"part-{shard}.jsonl").write_text("".join(lines))
        config = make_config(updates=12, output=str(tmp_path / output), task__labels=["high", "low"], **changes)
        data = {"train": str(tmp_path / "part-*.jsonl"), "streaming": True, "readers": 3, "shuffle_buffer": 8}
        config["data"] = {**config["data"], **data, "on_bad_row": "skip"}
        return config

    return make


def weights(output: str) -> bytes:
    return (Path(output) / "model" / "model.safetensors").read_bytes()


@pytest.mark.whole_run
def test_one_result_on_any_number_of_processes_and_after_a_stop(
    streamed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    alone, stopped, two = (streamed(name) for name in ("alone", "stopped", "two"))
    moved = streamed("moved")
    assert carry_out(alone, record=str(tmp_path / "alone.jsonl")) == 0
    assert carry_out(stopped, stop_after=5) == 0
    assert carry_out(stopped) == 0
    assert weights(stopped["output"]) == weights(alone["output"])
    assert carry_out(moved, stop_after=7, record=str(tmp_path / "moved.jsonl")) == 0
    jobs = [{"config": two}, {"config": moved, "record": str(tmp_path / "moved.jsonl")}]
    launch(jobs, 2, tmp_path)
    assert (tmp_path / "moved.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text()
    whole = load_file(Path(alone["output"]) / "model" / "model.safetensors")
    for other in (two, moved):
        found = load_file(Path(other["output"]) / "model" / "model.safetensors")
        assert all(torch.allclose(found[name], whole[name], rtol=1e-9, atol=1e-9) for name in whole)
        losses = figures(Path(other["output"]), "train/loss")
        assert losses == pytest.approx(figures(Path(alone["output"]), "train/loss"), rel=1e-9)
    told = [Path(run["output"], "skipped_rows_train.txt").read_text() for run in (alone, stopped, two, moved)]
    assert len(set(told)) == 1 and told[0].count("part-3.jsonl, line 21: 'text' is empty") == 3
    assert json.loads(Path(alone["output"], "result.json").read_text())["examples"] == 12 * 32
    Path(tmp_path / "part-1.jsonl").write_text("")
    with pytest.raises(UserError, match="not those that this run began with"):
        carry_out({**alone, "updates": 14}, resume_anyway=False)


def test_a_stream_is_known_by_all_that_makes_its_examples(
    streamed: Callable[..., dict[str, Any]], tmp_path: Path, tiny_model: str
) -> None:
    """Where a stream stands means nothing under another tokenizer, length or treatment of bad rows."""

    def of(config: dict[str, Any]) -> str:
        return ingredients.read(validate(config, "test")).splits["train"].fingerprint

    def fingerprint(**changes: Any) -> str:
        return of(streamed("known", **changes))

    shutil.copytree(tiny_model, tmp_path / "other")
    whole = fingerprint()
    assert fingerprint() == whole, "a run can go on"
    lengths = fingerprint(data__max_length=63), fingerprint(data__max_length=62)  # no row is as long
    file = tmp_path / "other" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": ["input_ids"]}))
    tokenizer = fingerprint(model__path=str(tmp_path / "other"))
    part = tmp_path / "part-3.jsonl"
    settings = streamed("raised")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows("single_label", 30, 3)))
    settings["data"]["on_bad_row"] = "error"
    raised = of(settings)
    settings["data"]["on_bad_row"] = "skip"
    assert of(settings) != raised
    assert len({whole, *lengths, tokenizer}) == 4


def test_what_a_stream_cannot_know_is_refused(streamed: Callable[..., dict[str, Any]]) -> None:
    config = streamed("refused", optim__warmup="1 epoch", evaluate__every="2 epochs")
    config.update(epochs=2, updates=None)
    config["data"]["train"] = [config["data"]["train"], {"path": "b.jsonl"}]
    config["task"]["class_weights"] = "balanced"
    with pytest.raises(UserError) as told:
        validate(config, "test")
    for part in (
        "epochs: how many",
        "optim.warmup: '1 epoch'",
        "evaluate.every",
        "give every one a weight",
        "balanced",
    ):
        assert part in str(told.value)
    assert "checkpoint.every" not in str(told.value)
    config = streamed("refused")
    del config["task"]["labels"]
    with pytest.raises(UserError, match=r"name every label of 'label' in task.labels; the first rows hold high, low"):
        carry_out(config)
    with pytest.raises(UserError, match="the starting model is asked about all training rows"):
        validate({**config, "task": {"name": "preference"}}, "test")
