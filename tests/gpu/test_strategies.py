"""On a real GPU: what `accelerate launch` makes of accelerate_configs/, in one process; and from there on CPUs.

The losses of all are one list: in float64 to 1e-9 beside a CPU, in bf16 to 2e-2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import figures, write_config
from tests.distributed import ROOT
from tests.every_task._runs import UPDATES, Build, builder, records
from train import zero

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

STOPPED = 5
SAMPLES = ("causal_lm", "text_classification")
ZERO = pytest.mark.skipif(not zero.installed(), reason="DeepSpeed is not installed")
STRATEGIES = ["ddp", "fsdp2", *(pytest.param(name, marks=ZERO) for name in ("deepspeed_zero2", "deepspeed_zero3"))]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str]) -> Build:
    return builder(tmp_path_factory.mktemp("gpu"), tiny_models)


def launch(jobs: list[dict[str, Any]], folder: Path, name: str, *arguments: str) -> None:
    """Carry out jobs (see `tests.worker`) as `accelerate launch --config_file NAME.yaml` starts them."""
    listed = folder / f"jobs-{name}-{len(list(folder.iterdir()))}.json"
    listed.write_text(json.dumps(jobs))
    command = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{name}.yaml"]
    paths = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, *command, "--num_processes", "1", "--main_process_port", "0", *arguments,
         "-m", "tests.worker", str(listed)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{name}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def run(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """Return a function that gives the outputs of the runs of SAMPLES under a strategy, made once."""
    folder = tmp_path_factory.mktemp("jobs")

    @cache
    def outputs(name: str, precision: str) -> dict[str, Path]:
        given = [build(sample, f"{name}-{precision}", precision=precision) for sample in SAMPLES]
        launch(jobs(given), folder, name, "--mixed_precision", "bf16" if precision == "bf16" else "no")
        return dict(zip(SAMPLES, (Path(each["output"]) for each in given), strict=True))

    return outputs


def jobs(configs: list[dict[str, Any]], stop_after: int | None = None) -> list[dict[str, Any]]:
    return [{"config": config, "stop_after": stop_after} for config in configs]


def same_losses(output: Path, reference: Path, tolerance: float) -> None:
    for name, count in (("train/loss", UPDATES), ("validation/loss", 2)):
        expected = figures(reference, name)
        assert len(expected) == count
        assert figures(output, name) == pytest.approx(expected, rel=tolerance)
    assert len(records(output)) == 31 and (output / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("sample", SAMPLES)
def test_gpu_and_cpu(run: Callable[..., dict[str, Path]], sample: str) -> None:
    same_losses(run("single_gpu", "fp64")[sample], run("cpu", "fp64")[sample], 1e-9)
    same_losses(run("single_gpu", "bf16")[sample], run("cpu", "fp64")[sample], 2e-2)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies(run: Callable[..., dict[str, Path]], name: str, sample: str) -> None:
    same_losses(run(name, "bf16")[sample], run("single_gpu", "bf16")[sample], 2e-2)


@pytest.mark.parametrize("name", ["single_gpu", *STRATEGIES])
def test_from_gpu_to_cpu_and_back(run: Callable[..., dict[str, Path]], build: Build, tmp_path: Path, name: str) -> None:
    """Stopped under a strategy on the GPU, gone on in one process on a CPU; and the other way round."""
    there = [build(sample, f"{name}-and-on", precision="bf16") for sample in SAMPLES]
    back = [build(sample, f"{name}-and-back", precision="bf16") for sample in SAMPLES]
    launch(jobs(there, STOPPED), tmp_path, name)
    launch([*jobs(back, STOPPED), *jobs(there)], tmp_path, "cpu", "--mixed_precision", "bf16")
    launch(jobs(back), tmp_path, name)
    for config in (*there, *back):
        expected = run("single_gpu", "bf16")[config["task"]["name"]]
        same_losses(Path(config["output"]), expected, 2e-2)


@pytest.mark.parametrize("name", ["fsdp2", pytest.param("deepspeed_zero3", marks=ZERO)])
def test_stages(build: Build, tmp_path: Path, name: str) -> None:
    """One after the other in one command: the second begins under the same strategy."""
    files = []
    for number in (1, 2):
        config = build("causal_lm", f"{name}-stage-{number}", precision="bf16")
        if number == 2:
            config["model"] = {**config["model"], "path": "${previous}"}
        files.append(str(write_config(config, tmp_path / f"stage{number}.yaml")))
    launch([{"files": files}], tmp_path, name)
    assert (Path(config["output"]) / "model" / "model.safetensors").is_file()
