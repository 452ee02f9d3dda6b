"""The promise, over all tasks: equal however cut and shared, exact after a stop, and of use to others when exported.

A task without a module in tests/every_task fails here.
"""

from __future__ import annotations

import hashlib
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
from tests.distributed import ROOT, launch
from tests.worker import carry_out
from train import plugins, predict, tasks

TASKS = plugins.names(tasks)
UPDATES = 12
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}

LORA = {"adapter": {"rank": 4, "alpha": 32}, "optim__lr": 1e-2}
VARIANTS: dict[str, dict[str, Any]] = {"whole": {}, "lora": LORA}
"""What every task is shown with: the whole model learns, or an adapter."""

Build = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def build(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: str, tiny_decoder: str, tiny_encoder_decoder: str
) -> Build:
    """Return a function that gives the config of a run of a task; dotted keys change it."""
    folder = tmp_path_factory.mktemp("every-task")

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
                "path": {"bert": tiny_model, "gpt2": tiny_decoder, "t5": tiny_encoder_decoder}[sample.model],
                "config": NO_DROPOUT[sample.model],
            },
            "optim": {"lr": 5e-3, "warmup": "10%"},
            "evaluate": {"every": 6, "batch_tokens": 100},
            "tracking": {"log_every": 1},
            "metrics": sample.metrics,
        }
        for key, value in changes.items():
            section, _, last = key.rpartition("__")
            (config[section] if section else config)[last] = value
        return config

    return make


@pytest.fixture(scope="module")
def whole(build: Build) -> Callable[..., Path]:
    """Return a function that gives the output of a task's run in one process and one cut, made once."""

    @cache
    def output(name: str, variant: str = "whole") -> Path:
        config = build(name, variant, micro_batch_size=32, **VARIANTS[variant])
        assert carry_out(config) == 0
        return Path(config["output"])

    return output


@pytest.fixture(scope="module")
def shared(build: Build, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every task's runs on 2 and on 3 processes, and one on 2 that stops on the way and goes on: `run` names them."""
    for world in (2, 3):
        jobs = [{"config": build(name, f"world-{world}")} for name in TASKS]
        if world == 2:
            for name in TASKS:
                settings = {"precision": "fp32", "model__config": {}}
                jobs.append({"config": build(name, "steady-2", **settings)})
                jobs.append({"config": build(name, "stopped-2", **settings), "stop_after": 8})
                jobs.append({"config": build(name, "stopped-2", **settings)})
        launch(jobs, world, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def adapted(build: Build, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every task's run with an adapter on 2 processes, which stops on the way and goes on."""
    jobs = [{"config": build(name, "lora-2", **LORA), **stop} for name in TASKS for stop in ({"stop_after": 8}, {})]
    launch(jobs, 2, tmp_path_factory.mktemp("adapted"))


def same(output: Path, reference: Path) -> None:
    """Equal losses in every update, equal figures, equal predictions, but for float64's rounding."""
    for name in ("train/loss", "validation/loss"):
        expected = figures(reference, name)
        assert len(expected) == (UPDATES if name == "train/loss" else 2)
        assert figures(output, name) == pytest.approx(expected, rel=1e-9)
    found, expected = (json.loads((folder / "result.json").read_text())["metrics"] for folder in (output, reference))
    assert len(expected) >= 2 and found == pytest.approx(expected, rel=1e-9)
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


def test_there_are_tasks() -> None:
    assert "text_classification" in TASKS
    samples = {path.stem for path in (ROOT / "tests" / "every_task").glob("[!_]*.py")}
    assert samples == set(TASKS), "every task has a sample in tests/every_task, and every sample a task"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TASKS)
def test_the_cut_does_not_matter(name: str, variant: str, build: Build, whole: Callable[..., Path]) -> None:
    config = build(name, f"{variant}-cut", micro_batch_size=5, **VARIANTS[variant])
    assert carry_out(config) == 0
    losses = list(figures(whole(name, variant), "train/loss").values())
    assert min(losses[-3:]) < losses[0], "nothing is learned, so nothing is shown"
    same(Path(config["output"]), whole(name, variant))


@pytest.mark.parametrize("name", TASKS)
def test_processes_do_not_matter(name: str, build: Build, whole: Callable[..., Path], shared: None) -> None:
    for world in (2, 3):
        output = Path(build(name, f"world-{world}")["output"])
        assert json.loads((output / "result.json").read_text())["world_size"] == world
        same(output, whole(name))


@pytest.mark.parametrize("name", TASKS)
def test_a_stop_in_the_middle_of_an_epoch_does_not_matter(name: str, build: Build, shared: None) -> None:
    """Dropout on, fp32: the weights are equal to the last bit, on one process and on two."""
    settings = {"precision": "fp32", "model__config": {}, "micro_batch_size": 11}
    assert carry_out(build(name, "steady-1", **settings)) == 0
    assert carry_out(build(name, "stopped-1", **settings), stop_after=8) == 0
    assert not (Path(build(name, "stopped-1")["output"]) / "DONE").exists()
    assert carry_out(build(name, "stopped-1", **settings)) == 0
    for world in (1, 2):
        steady, stopped = (Path(build(name, f"{kind}-{world}")["output"]) for kind in ("steady", "stopped"))
        weights = [
            hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()
            for output in (steady, stopped)
        ]
        assert weights[0] == weights[1], f"{world} processes"
        assert records(steady) == records(stopped)


@pytest.mark.parametrize("name", TASKS)
def test_with_an_adapter_neither_processes_nor_a_stop_matter(
    name: str, build: Build, whole: Callable[..., Path], adapted: None
) -> None:
    """Two processes that stopped on the way are as one that did not; on one, dropout on, fp32, to the last bit."""
    same(Path(build(name, "lora-2")["output"]), whole(name, "lora"))
    settings = {**LORA, "adapter": {**LORA["adapter"], "dropout": 0.1}, "precision": "fp32", "model__config": {}}
    found = []
    for run, stops in (("lora-steady", (None,)), ("lora-stopped", (8, None))):
        config = build(name, run, **settings)
        for stop in stops:
            assert carry_out(config, stop_after=stop) == 0
        weights = Path(config["output"]) / "model" / "adapter_model.safetensors"
        found.append((hashlib.sha256(weights.read_bytes()).hexdigest(), records(Path(config["output"]))))
    assert found[0] == found[1]


MERGE = """
import transformers
from peft import PeftModel
about = json.load(open(folder + "/adapter_config.json"))
base = getattr(transformers, about["auto_mapping"]["base_model_class"]).from_pretrained(
    about["base_model_name_or_path"], config=transformers.AutoConfig.from_pretrained(folder), dtype="float64"
)
model = PeftModel.from_pretrained(base, folder).merge_and_unload()
if os.path.exists(folder + "/generation_config.json"):
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
model.save_pretrained("merged")
transformers.AutoTokenizer.from_pretrained(folder).save_pretrained("merged")
folder = "merged"
"""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TASKS)
def test_the_exported_model_is_of_use_in_a_fresh_process(
    name: str, variant: str, build: Build, whole: Callable[..., Path], tmp_path: Path
) -> None:
    """An adapter is put on its base by peft and merged there; nothing of ours takes part."""
    output, sample = whole(name, variant), every_task.load(name)
    given = json.dumps([str(output / "model"), sample.rows(31, len("validation"))])
    program = f"""
import json, os, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from tests import every_task
folder, rows = json.load(open(sys.argv[1]))
{MERGE if variant == "lora" else ""}
json.dump(every_task.load({name!r}).reload(pathlib.Path(folder), rows), open(sys.argv[2], "w"))
"""
    (tmp_path / "given.json").write_text(given)
    done = subprocess.run(
        [sys.executable, "-c", program, "given.json", "found.json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    close(found, json.loads(json.dumps([sample.expected(record) for record in records(output)])), 1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_rows_without_targets_are_answered_as_in_the_run(
    name: str, build: Build, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    sample = every_task.load(name)
    rows = [{column: row[column] for column in sample.inputs} for row in sample.rows(31, len("validation"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(sample.asked(row)) + "\n" for row in rows))
    options = ["--precision", "fp64", "--part-rows", "9", "--batch-tokens", "100", "--cache", str(tmp_path / "cache")]
    found = tmp_path / "predictions.jsonl"
    assert (
        predict.main([str(whole(name)), "--input", str(tmp_path / "rows.jsonl"), "--output", str(found), *options]) == 0
    )
    answers = [json.loads(line) for line in found.read_text().splitlines()]
    assert [answer["row"] for answer in answers] == list(range(31))
    assert all("prediction" in answer and "reference" not in answer and "loss" not in answer for answer in answers)
    if sample.asks_the_same:
        expected = [{key: record[key] for key in answers[0]} for record in records(whole(name))]
        close(answers, expected, 1e-5)
