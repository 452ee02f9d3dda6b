"""The same promise with an adapter: every task with LoRA, cut, shared, stopped, merged by others, asked.

Nothing of the model but the adapter, and what is new, learns, is kept or exported; a task that exports nothing but
whole models merges it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import figures
from tests.distributed import launch
from tests.every_task._runs import (
    TASKS,
    Build,
    answered_as_in_the_run,
    as_the_run_said,
    builder,
    records,
    reloaded,
    runner,
    same,
)
from tests.worker import carry_out

LORA = {"adapter": {"rank": 4, "alpha": 32}, "optim__lr": 1e-2}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str]) -> Build:
    return builder(tmp_path_factory.mktemp("every-task"), tiny_models)


@pytest.fixture(scope="module")
def whole(build: Build) -> Callable[[str], Path]:
    return runner(build, "whole", **LORA)


@pytest.fixture(scope="module")
def adapted(build: Build, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every task's run with an adapter on 2 processes, which stops on the way and goes on."""
    jobs = [{"config": build(name, "lora-2", **LORA), **stop} for name in TASKS for stop in ({"stop_after": 3}, {})]
    launch(jobs, 2, tmp_path_factory.mktemp("adapted"))


@pytest.mark.parametrize("name", TASKS)
def test_the_cut_does_not_matter(name: str, build: Build, whole: Callable[[str], Path]) -> None:
    config = build(name, "cut", micro_batch_size=5, **LORA)
    assert carry_out(config) == 0
    losses = list(figures(whole(name), "train/loss").values())
    assert min(losses[-3:]) < losses[0], "nothing is learned, so nothing is shown"
    same(Path(config["output"]), whole(name))


@pytest.mark.whole_run
@pytest.mark.parametrize("name", TASKS)
def test_with_an_adapter_neither_processes_nor_a_stop_matter(
    name: str, build: Build, whole: Callable[[str], Path], adapted: None
) -> None:
    """Two processes that stopped on the way are as one that did not; on one, dropout on, fp32, to the last bit."""
    same(Path(build(name, "lora-2")["output"]), whole(name))
    settings = {**LORA, "adapter": {**LORA["adapter"], "dropout": 0.1}, "precision": "fp32", "model__config": {}}
    found = []
    for run, stops in (("lora-steady", (None,)), ("lora-stopped", (3, None))):
        config = build(name, run, **settings)
        for stop in stops:
            assert carry_out(config, stop_after=stop) == 0
        [weights] = (Path(config["output"]) / "model").glob("*.safetensors")
        found.append((hashlib.sha256(weights.read_bytes()).hexdigest(), records(Path(config["output"]))))
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def fresh(whole: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reloaded(
        {name: whole(name) for name in TASKS},
        tmp_path_factory.mktemp("fresh"),
        "from tests.every_task._merged import merged; folder = merged(folder, name)",
    )


@pytest.mark.whole_run
@pytest.mark.parametrize("name", TASKS)
def test_the_exported_adapter_is_of_use_in_a_fresh_process(
    name: str, whole: Callable[[str], Path], fresh: dict[str, Any]
) -> None:
    as_the_run_said(name, fresh[name], whole(name))


@pytest.mark.parametrize("name", TASKS)
def test_rows_without_targets_are_answered_as_in_the_run(
    name: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    answered_as_in_the_run(name, whole(name), tmp_path)
