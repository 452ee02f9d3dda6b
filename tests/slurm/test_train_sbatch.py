"""`slurm/train.sbatch` on a real cluster of two nodes: small, plain, and fast enough for every day."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.jobs import Job, preempt

UPDATES = 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", 2) as running:
        yield running


def config(make_config: Callable[..., dict[str, Any]], output: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "updates": UPDATES, "precision": "fp32", "model__config": {}, "checkpoint__every": 20, "validation": 9,
        "tracking__trackers": ["wandb"], "tracking__mode": "offline",
    }  # fmt: skip
    return make_config(train=400, output=str(output), **{**settings, **changes})


@pytest.mark.whole_run
def test_preempted_and_undisturbed(
    cluster: Cluster, make_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    whole = Job(cluster, config(make_config, tmp_path / "whole"))
    assert whole.end() == "COMPLETED", whole.text()
    job = Job(cluster, config(make_config, tmp_path / "preempted"))
    job.reach(5)
    preempt(cluster)
    assert job.end() == "COMPLETED", job.text()
    first, second = job.launches()
    assert 5 <= second["update"] < UPDATES and "stopped with a checkpoint" in job.text()
    assert job.weights() == whole.weights()
    ids, steps, configs = job.tracked()
    assert len(ids) == 1 and steps == list(range(1, UPDATES + 1))
    for launch, restarts in ((first, 0), (second, 1)):
        assert launch["restarts"] == restarts and launch["world_size"] == 2
        assert launch["slurm"] == {"job_id": job.number, "restarts": restarts, "nodes": ["node1", "node2"]}
    assert configs[-1]["launch"] == second, "a run has one config at W&B: the last start's"
