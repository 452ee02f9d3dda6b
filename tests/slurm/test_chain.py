"""Stages as jobs that wait for each other, and a sweep as an array, on a real cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_config
from tests.slurm.cluster import Cluster, missing
from tests.slurm.jobs import ROOT

pytestmark = pytest.mark.slow
OPTIONS = ("--nodes=1", "--gpus-per-node=0", "--ntasks-per-node=1")
ENDED = "COMPLETED"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", 1) as running:
        running.variables["PATH"] = f"{Path(sys.executable).parent}:{running.variables['PATH']}"
        running.variables["OMP_NUM_THREADS"] = "1"
        yield running


def finish(cluster: Cluster, jobs: list[str]) -> None:
    cluster.until(lambda: all(cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING") for job in jobs), 900)


def test_stages_and_a_sweep(cluster: Cluster, make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    small: dict[str, Any] = {"updates": 3, "precision": "fp32", "train": 40, "validation": 9}
    first = write_config(make_config(**small, output=str(tmp_path / "first")), tmp_path / "first.yaml")
    second = make_config(**small, output=str(tmp_path / "second"), model__path="${previous}")
    later = write_config(second, tmp_path / "second.yaml")
    log = f"--output={tmp_path}/%x-%j.log"
    cluster.variables["PWD"] = str(tmp_path)
    told = cluster.call(
        str(ROOT / "slurm" / "stages.sh"), "--prepare-data", *OPTIONS, log, f"--chdir={tmp_path}", "--", str(first),
        str(later), "seed=5", "second:seed=6", timeout=200,
    )  # fmt: skip
    assert "first.yaml: prepared: train 40" in told and "second.yaml: reads from" in told
    jobs = [line.rpartition(" ")[2] for line in told.splitlines() if ": job " in line]
    assert len(jobs) == 2
    grid = cluster.call(
        "sbatch", "--parsable", "--array=0-1", log, f"--chdir={tmp_path}", *OPTIONS,
        str(ROOT / "slurm" / "sweep.sbatch"), str(first), "seed=1,2", "tracking={trackers: [wandb], mode: offline}",
    )  # fmt: skip
    finish(cluster, [*jobs, f"{grid}_0", f"{grid}_1"])
    logs = "\n".join(file.read_text() for file in tmp_path.glob("*.log"))
    assert [cluster.state(job) for job in (*jobs, f"{grid}_0", f"{grid}_1")] == [ENDED] * 4, logs
    assert "seed: 6" in (tmp_path / "second" / "config.yaml").read_text()
    begun = json.loads((tmp_path / "second" / "result.json").read_text())["started_from"]["path"]
    assert begun == str(tmp_path / "first" / "model")
    for place in (0, 1):
        folder = tmp_path / "first-sweep" / f"seed={place + 1}"
        assert (folder / "DONE").exists() and "group: first" in (folder / "config.yaml").read_text()
        launch = json.loads((folder / "launches.jsonl").read_text())
        assert launch["slurm"]["array_task_id"] == str(place)


def test_after_a_stage_that_failed_comes_none(
    cluster: Cluster, make_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Rows without a column that is needed: seen by the job only, and in vain to try again."""
    bad = make_config(updates=3, output=str(tmp_path / "bad"), task__text="txt")
    first = write_config(bad, tmp_path / "bad.yaml")
    after = make_config(updates=3, output=str(tmp_path / "after"), model__path="${previous}")
    later = write_config(after, tmp_path / "after.yaml")
    log = f"--output={tmp_path}/%x-%j.log"
    script = str(ROOT / "slurm" / "stages.sh")
    told = cluster.call(script, *OPTIONS, log, f"--chdir={tmp_path}", "--", str(first), str(later), timeout=200)
    jobs = [line.rpartition(" ")[2] for line in told.splitlines() if ": job " in line]
    finish(cluster, jobs[:1])
    cluster.until(lambda: cluster.state(jobs[1]) == "CANCELLED", 60)
    text = (tmp_path / f"bad-{jobs[0]}.log").read_text()
    assert cluster.state(jobs[0]) == "FAILED" and "ExitCode=2:0" in cluster.call("scontrol", "show", "job", jobs[0])
    assert "something has to be mended first" in text and "no column 'txt'" in text and "failure" not in text, text
