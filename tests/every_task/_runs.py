"""The runs that the promise is shown on: each task's, of the whole model or with an adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import every_task
from tests.conftest import figures
from tests.distributed import ROOT
from tests.worker import carry_out
from train import plugins, predict, tasks

TASKS = plugins.names(tasks)
UPDATES = 8
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}

Build = Callable[..., dict[str, Any]]


def builder(folder: Path, models: dict[str, str]) -> Build:
    """Return a function that gives the config of a run of a task, in `folder`; dotted keys change it."""

    def make(name: str, run: str, **changes: Any) -> dict[str, Any]:
        sample = every_task.load(name)
        for role, count in (("train", 150), ("validation", 31)):
            lines = [json.dumps(row) + "\n" for row in sample.rows(count, len(role))]
            (folder / f"{name}-{role}.jsonl").write_text("".join(lines))
        config: dict[str, Any] = {
            "output": str(folder / f"{name}-{run}"),
            "seed": 3,
            "batch_size": 32,
            "updates": UPDATES,
            "precision": "fp64",
            "task": {"name": name, **sample.task},
            "data": {
                **{role: str(folder / f"{name}-{role}.jsonl") for role in ("train", "validation")},
                "cache": str(folder / "cache"),
                **sample.data,
            },
            "model": {
                "path": models[sample.model],
                "config": NO_DROPOUT[sample.model],
            },
            "optim": {"lr": 5e-3, "warmup": "10%"},
            "evaluate": {"every": 4, "batch_tokens": 100},
            "tracking": {"log_every": 1},
            "metrics": sample.metrics,
        }
        for key, value in changes.items():
            section, _, last = key.rpartition("__")
            (config[section] if section else config)[last] = value
        if "adapter" in config and sample.merges:
            config["adapter"] = {**config["adapter"], "merge": True}
        return config

    return make


def runner(build: Build, run: str, **settings: Any) -> Callable[[str], Path]:
    """Return a function that gives the output of a task's run in one process and one cut, made once."""

    @cache
    def output(name: str) -> Path:
        config = build(name, run, micro_batch_size=32, **settings)
        assert carry_out(config) == 0
        return Path(config["output"])

    return output


def same(output: Path, reference: Path, tolerance: float = 1e-9) -> None:
    """Equal losses in every update, equal figures, equal predictions, but for rounding (by default float64's)."""
    for name in ("train/loss", "validation/loss"):
        expected = figures(reference, name)
        assert len(expected) == (UPDATES if name == "train/loss" else 2)
        assert figures(output, name) == pytest.approx(expected, rel=tolerance)
    found, expected = (json.loads((folder / "result.json").read_text())["metrics"] for folder in (output, reference))
    assert len(expected) >= 2 and found == pytest.approx(expected, rel=tolerance)
    close(records(output), records(reference), 1e-5)  # scores are rounded to six digits


def records(output: Path) -> list[Any]:
    lines = (output / "predictions" / "validation.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Compare nested lists and mappings: numbers to a tolerance, all else exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            close(found[key], value, tolerance)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    else:
        assert found == expected


PROGRAM = """
import json, os, pathlib, sys, traceback
from tests import every_task
results = []
for name, folder, rows in json.load(open(sys.argv[1])):
    try:
        {prepare}
        results.append([every_task.load(name).reload(pathlib.Path(folder), rows), None])
    except BaseException:
        results.append([None, traceback.format_exc()])
json.dump(results, open(sys.argv[2], "w"))
"""


def reloaded(outputs: dict[str, Path], folder: Path, prepare: str = "pass") -> dict[str, Any]:
    """Return what a fresh process, in which nothing was trained, finds with the model that each task has exported.

    `prepare` is a line of Python that may change `folder` first. What a task's part of it raises, is in its place.
    """
    given = [
        (name, str(output / "model"), every_task.load(name).rows(31, len("validation")))
        for name, output in outputs.items()
    ]
    (folder / "given.json").write_text(json.dumps(given))
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})" + PROGRAM.format(prepare=prepare)
    done = subprocess.run(
        [sys.executable, "-c", program, "given.json", "found.json"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(outputs, json.loads((folder / "found.json").read_text()), strict=True))


def as_the_run_said(name: str, found: list[Any], output: Path) -> None:
    """Hold what a fresh process found against the run's own records."""
    result, problem = found
    assert problem is None, problem
    sample = every_task.load(name)
    close(result, json.loads(json.dumps([sample.expected(record) for record in records(output)])), 1e-4)


def answered_as_in_the_run(name: str, output: Path, folder: Path) -> None:
    """Let `train.predict` answer the validation rows, without their targets: as the run did, where that is the same."""
    sample = every_task.load(name)
    rows = [{column: row[column] for column in sample.inputs} for row in sample.rows(31, len("validation"))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(sample.asked(row)) + "\n" for row in rows))
    options = ["--precision", "fp64", "--part-rows", "9", "--batch-tokens", "100", "--cache", str(folder / "cache")]
    found = folder / "predictions.jsonl"
    paths = ["--input", str(folder / "rows.jsonl"), "--output", str(found)]
    assert predict.main([str(output), *paths, *options]) == 0
    answers = [json.loads(line) for line in found.read_text().splitlines()]
    assert [answer["row"] for answer in answers] == list(range(31))
    assert all("prediction" in answer and "reference" not in answer and "loss" not in answer for answer in answers)
    if sample.asks_the_same:
        expected = [{key: record[key] for key in answers[0]} for record in records(output)]
        close(answers, expected, 1e-5)
