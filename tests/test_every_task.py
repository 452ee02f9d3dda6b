"""The promise, over all tasks: equal however cut and shared, exact after a stop, and of use to others when exported.

A task without a module in tests/every_task fails here.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionMaskInterface, PreTrainedModel

from tests import every_task
from tests.conftest import figures
from tests.distributed import ROOT, launch
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
from train import evaluation, hardware, padding_free, prefetch
from train.update import Learner

ENCODERS = [name for name in TASKS if every_task.load(name).model == "bert"]
"""Tasks whose model can compute without padding. Of `preference`'s losses one has such a model."""

ASKING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
"""Operators whose answer a host waits for."""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str]) -> Build:
    return builder(tmp_path_factory.mktemp("every-task"), tiny_models)


@pytest.fixture(scope="module")
def whole(build: Build) -> Callable[[str], Path]:
    return runner(build, "whole")


@pytest.fixture(scope="module")
def shared(build: Build, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every task's run on 2 processes, and one on 2 that stops on the way and goes on: `run` names them."""
    jobs = [{"config": build(name, "world-2")} for name in TASKS]
    for name in TASKS:
        settings = {"precision": "fp32", "model__config": {}}
        jobs.append({"config": build(name, "steady-2", **settings)})
        jobs.append({"config": build(name, "stopped-2", **settings), "stop_after": 3})
        jobs.append({"config": build(name, "stopped-2", **settings)})
    launch(jobs, 2, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def shared_by_three(build: Build, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every task's run on 3 processes."""
    launch([{"config": build(name, "world-3")} for name in TASKS], 3, tmp_path_factory.mktemp("jobs"))


def test_there_are_tasks() -> None:
    assert "text_classification" in TASKS
    samples = {path.stem for path in (ROOT / "tests" / "every_task").glob("[!_]*.py")}
    assert len(ENCODERS) >= 6
    assert samples == set(TASKS), "every task has a sample in tests/every_task, and every sample a task"


@pytest.mark.parametrize("name", TASKS)
def test_the_cut_does_not_matter(name: str, build: Build, whole: Callable[[str], Path]) -> None:
    config = build(name, "cut", micro_batch_size=5)
    assert carry_out(config) == 0
    losses = list(figures(whole(name), "train/loss").values())
    assert min(losses[-3:]) < losses[0], "nothing is learned, so nothing is shown"
    same(Path(config["output"]), whole(name))


@pytest.mark.whole_run
@pytest.mark.parametrize("name", TASKS)
def test_two_processes_do_not_matter(name: str, build: Build, whole: Callable[[str], Path], shared: None) -> None:
    check_world(2, name, build, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_three_processes_do_not_matter(
    name: str, build: Build, whole: Callable[[str], Path], shared_by_three: None
) -> None:
    check_world(3, name, build, whole)


def check_world(world: int, name: str, build: Build, whole: Callable[[str], Path]) -> None:
    output = Path(build(name, f"world-{world}")["output"])
    assert json.loads((output / "result.json").read_text())["world_size"] == world
    same(output, whole(name))


@pytest.mark.whole_run
@pytest.mark.parametrize("name", TASKS)
def test_a_stop_in_the_middle_of_an_epoch_does_not_matter(name: str, build: Build, shared: None) -> None:
    """Dropout on, fp32: the weights are equal to the last bit, on one process and on two."""
    settings = {"precision": "fp32", "model__config": {}, "micro_batch_size": 11}
    assert carry_out(build(name, "steady-1", **settings)) == 0
    assert carry_out(build(name, "stopped-1", **settings), stop_after=3) == 0
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
def test_no_update_asks_for_a_value(name: str, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that would be to wait for it: none is read between two log lines, counted here where no GPU is.

    Without what a CPU does in another way: transformers looks at masks there, and so does what leaves padding out
    (`tests/gpu/test_updates.py` counts everything).
    """
    read, real = list[int](), Learner.update

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            read[-1] += operator in ASKING and not _of_masks()
            return operator(*given, **(named or {}))

    def update(self: Learner, number: int, batch: Any) -> Any:
        read.append(0)
        with Reads():
            return real(self, number, batch)

    monkeypatch.setattr(Learner, "update", update)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", None)  # what it was comes back at the end
    monkeypatch.setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", None)
    hardware._never_ask()  # as on a GPU
    asked = {"padding_free": False, "tracking__log_every": 100, "evaluate__every": 100, "micro_batch_size": 11}
    assert carry_out(build(name, "asked", updates=3, epochs=None, **asked)) == 0
    assert read == [0, 0, 0]


@pytest.mark.parametrize("name", [*ENCODERS, "preference"])
def test_encoders_without_padding_are_told_how_many_tokens_there_are(
    name: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In updates and evaluations: else each micro-batch would wait for a GPU to count its mask's ones.

    Batches are sent as to a GPU, and to the device that is here.
    """
    told, known = set[tuple[str, bool]](), padding_free._known

    def watching(real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(mask: torch.Tensor) -> int | None:
            found = known(mask)
            assert found in (None, int(mask.sum()))
            told.add((real.__name__, found is not None))
            return found

        def call(*given: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(padding_free, "_known", watched)
                return real(*given)

        return call

    monkeypatch.setattr(Learner, "update", watching(Learner.update))
    monkeypatch.setattr(evaluation, "predictions", watching(evaluation.predictions))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr("train.run.prefetch", lambda batches, numbered, device: prefetch._at_once(numbered, device))
    monkeypatch.setattr(evaluation, "send_to_device", prefetch.sent)
    scored = {"task": {"name": name, "loss": "reward"}, "metrics": []} if name == "preference" else {}
    config = build(name, "told", updates=2, micro_batch_size=11, evaluate__every=2, **scored)
    assert carry_out(config) == 0
    assert told == {("update", True), ("predictions", True)}


def _of_masks() -> bool:
    """Whether transformers is making a mask."""
    return any(frame.f_globals["__name__"] == "transformers.masking_utils" for frame, _ in traceback.walk_stack(None))


@pytest.fixture(scope="module")
def fresh(whole: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reloaded({name: whole(name) for name in TASKS}, tmp_path_factory.mktemp("fresh"))


@pytest.mark.parametrize("name", TASKS)
def test_the_exported_model_is_of_use_in_a_fresh_process(
    name: str, whole: Callable[[str], Path], fresh: dict[str, Any]
) -> None:
    as_the_run_said(name, fresh[name], whole(name))


@pytest.mark.parametrize("name", TASKS)
def test_rows_without_targets_are_answered_as_in_the_run(
    name: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    answered_as_in_the_run(name, whole(name), tmp_path)
