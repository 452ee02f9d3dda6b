"""`python -m train.submit` as the README has it, on a real cluster whose nodes have GPUs, of which Slurm alone knows.

The trainer is told to use the CPU.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_config
from tests.slurm.cluster import Cluster, missing
from tests.slurm.jobs import ENDED, ROOT

pytestmark = pytest.mark.slow
GPUS = 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", 1, gpus=GPUS) as running:
        running.variables["PATH"] = f"{Path(sys.executable).parent}:{running.variables['PATH']}"
        running.variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        yield running


def submit(cluster: Cluster, config: dict[str, Any], *options: str) -> tuple[str, Path]:
    """Submit a run through the checks; return its number and its log."""
    output = Path(config["output"])
    file, log = write_config(config, output.with_suffix(".yaml")), output.with_suffix(".log")
    told = cluster.call(
        sys.executable, "-m", "train.submit", str(file), "--nodes", "1", "--gpus-per-node", str(GPUS), "--time",
        "1:00:00", "--partition", "low", "--local-anyway", f"--output={log}", f"--chdir={output.parent}", *options,
    )  # fmt: skip
    found = re.search(r"Submitted batch job (\d+)", told)
    assert found and f"1 node × {GPUS} processes share batches" in told, told
    return found[1], log


def test_submitted_and_spread(cluster: Cluster, make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """One process for each GPU, to the end; FSDP2 is asked for by the right variables, and refused without real GPUs:
    by the processes, after which the job is not tried again."""
    seen = cluster.call("srun", f"--gpus-per-node={GPUS}", f"--ntasks={GPUS}", "printenv", "CUDA_VISIBLE_DEVICES")
    assert seen.split() == ["0,1"] * GPUS, "every process sees all GPUs of its node, and takes one"
    small: dict[str, Any] = {"updates": 3, "precision": "fp32", "train": 40, "validation": 9}
    copies, _ = runs = [
        submit(cluster, make_config(**small, output=str(tmp_path / name)), "--accelerate-config", name, "seed=5")
        for name in ("ddp", "fsdp2")
    ]
    cluster.until(lambda: all(cluster.state(job) in ENDED for job, _ in runs), 900)
    logs = [log.read_text() for _, log in runs]
    assert [cluster.state(job) for job, _ in runs] == ["COMPLETED", "FAILED"], logs
    about = cluster.call("scontrol", "show", "job", copies[0])
    assert f"gpu:{GPUS}" in about and f"{ROOT}/slurm/train.sbatch" in about
    result = json.loads((tmp_path / "ddp" / "result.json").read_text())
    assert result["world_size"] == GPUS and (tmp_path / "ddp" / "DONE").exists() and "spread as" in logs[0]
    assert "seed: 5" in (tmp_path / "ddp" / "config.yaml").read_text()
    assert "asked for FSDP, which needs several processes with a GPU each; here are 2 on cpu" in logs[1]
    assert "ExitCode=2:0" in cluster.call("scontrol", "show", "job", runs[1][0])
    assert "something has to be mended first" in logs[1] and "failure" not in logs[1]
    assert not (tmp_path / "fsdp2").exists() or not (tmp_path / "fsdp2" / "config.yaml").exists()
