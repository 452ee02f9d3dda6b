"""Asked to stop in any phase, one process of one or of two: all leave soon and in order, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import phases
from tests.distributed import launch
from tests.every_task._runs import Build, builder
from tests.worker import carry_out, carry_out_and_ask
from train import compilation, manifest

pytestmark = [
    pytest.mark.whole_run,
    pytest.mark.filterwarnings("ignore:::torch", "ignore:The .grad attribute", "ignore:.*torch.jit"),  # its compiler's
]

TASK = {"reference": "preference", "generation": "seq2seq"}
"""The task that is in a phase; of the others every task is."""

LEFT: dict[str, int | None] = {
    "encoding": None,
    "reference": None,
    "compile": None,
    "first update": 1,
    "update": 3,
    "evaluation": 4,
    "generation": 4,
    "saving": 5,  # or later: training goes on meanwhile
    "last evaluation": 8,
}
"""The phases in which a run is left undone, and the update whose checkpoint must be there."""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str]) -> Build:
    return builder(tmp_path_factory.mktemp("phases"), tiny_models)


@pytest.fixture(autouse=True)
def same_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back the signal handlers that a run installs, and let it not have been asked; compile without C++."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    phases.forget()


def config_of(build: Build, phase: str, run: str) -> dict[str, Any]:
    """A run of 8 updates with dropout, judged and saved after the fourth and the last."""
    task = TASK.get(phase, "text_classification")
    settings: dict[str, Any] = {"precision": "fp32", "model__config": {}, "checkpoint": {"every": 4}}
    if phase == "compile":
        settings["compile"] = True
    config = build(task, run, **settings)
    if phase in ("encoding", "reference"):  # nobody has done before what is to be broken off
        config["data"]["cache"] += f"-{run}"
    return config


def whole_of(build: Build, phase: str, run: str) -> dict[str, Any]:
    """The run that is not asked, by which one is to be judged that is asked in this phase."""
    return config_of(build, phase, f"{run}-compiled" if phase == "compile" else run)


def outcome(config: dict[str, Any]) -> tuple[str, list[dict[str, float]]]:
    """The hash of the exported weights, and the figures of every update that depend on no clock."""
    output = Path(config["output"])
    assert (output / "DONE").exists()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("train/tokens_per_second", None)
    return hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest(), lines


def check_left(config: dict[str, Any], phase: str) -> None:
    """Look at what a run leaves that was asked to stop in this phase."""
    output = Path(config["output"])
    if phase not in LEFT:
        assert (output / "DONE").exists()
        return
    update = LEFT[phase]
    if update is None:
        assert not output.exists()
        assert not list(Path(config["data"]["cache"]).rglob("*.writing"))
        return
    assert not (output / "DONE").exists()
    checkpoints = sorted((output / "checkpoints").iterdir())
    if phase == "saving":
        update = max(update, int(checkpoints[-1].name[-8:]))
    assert checkpoints[-1].name == f"update-{update:08d}"
    assert manifest.problem(checkpoints[-1]) is None
    assert f"stopped after update {update}" in (output / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize("phase", phases.PHASES)
def test_alone(phase: str, build: Build, request: pytest.FixtureRequest) -> None:
    config, whole = config_of(build, phase, f"alone-{phase}"), whole_of(build, phase, "alone")
    if not (Path(whole["output"]) / "DONE").exists():
        assert carry_out(whole) == 0
    assert carry_out_and_ask(config, phase, 0) == 0
    check_left(config, phase)
    assert carry_out(config) == 0
    assert outcome(config) == outcome(whole)


FAST = ("encoding", "update", "evaluation", "saving")


@pytest.mark.parametrize(
    "chosen", [FAST, pytest.param(tuple(phases.PHASES), marks=pytest.mark.slow)], ids=["four", "all"]
)
def test_one_of_two(chosen: tuple[str, ...], build: Build, tmp_path: Path) -> None:
    """The second process is asked; in two phases the first one is, by the file."""
    name = f"two-{len(chosen)}"
    wholes = {config["output"]: config for config in (whole_of(build, phase, name) for phase in chosen)}
    jobs: list[dict[str, Any]] = [{"config": config} for config in wholes.values()]
    configs = {}
    for phase in chosen:
        config = configs[phase] = config_of(build, phase, f"{name}-{phase}")
        ask: dict[str, Any] = {"phase": phase, "rank": 1}
        if phase in ("update", "evaluation"):
            ask = {"phase": phase, "rank": 0, "stop_file": str(Path(config["output"]) / "STOP")}
        jobs += [{"config": config, **ask}, {"config": config}]
    jobs = [{**job, "backend": "aot_eager"} for job in jobs]
    launch(jobs, 2, tmp_path)
    for phase, config in configs.items():
        assert outcome(config) == outcome(whole_of(build, phase, name)), phase
        assert not list(Path(config["output"]).glob("STOP*")), "nothing of it stays in the way"
