"""Jobs that are disturbed in every way that a cluster knows, on two nodes of two processes, each a machine of its own.

With network namespaces and proctrack/cgroup. Each ends by itself, with the weights of the run that nobody disturbed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.jobs import Job, preempt
from tests.slurm.test_train_sbatch import UPDATES, config

pytestmark = pytest.mark.slow
MakeConfig = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing(namespaces=True):
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", 2, namespaces=True) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: Cluster) -> Iterator[None]:
    """Take away what a test that failed has left in the queue."""
    yield
    cluster.call("scancel", "--user", str(os.geteuid()))


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """The weights of the undisturbed run, which the first test fills in."""
    return {}


def preempted(cluster: Cluster, job: Job) -> None:
    preempt(cluster)


def reach_the_time_limit_twice(cluster: Cluster, job: Job) -> None:
    """The limit is brought down to three minutes from now: the signal that comes four minutes before it is due at once.

    A limit is a whole number of minutes, and a start may take that long on a busy machine. Slurm looks at limits every
    half minute or so: this run is slow.
    """
    for number in (1, 2):
        *_, minutes, _ = cluster.call("squeue", "-h", "-j", job.number, "-o", "0:%M").split(":")
        cluster.call("scontrol", "update", f"JobId={job.number}", f"TimeLimit={int(minutes) + 4}")
        cluster.until(lambda number=number: f"start {number + 1}," in job.text(), 300)  # type: ignore[misc]
        cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
        if number == 1:
            cluster.until(lambda: len(job.launches()) == 2, 300)
            job.reach(job.launches()[-1]["update"] + 2)


def lose_a_node(cluster: Cluster, job: Job) -> None:
    lose(cluster, "node2")


def lose_the_batch_host(cluster: Cluster, job: Job) -> None:
    lose(cluster, "node1")


def lose(cluster: Cluster, name: str) -> None:
    cluster.cut_power(name)
    cluster.until(lambda: cluster.down(name), 60)
    cluster.boot(name)


def cut_the_network(cluster: Cluster, job: Job) -> None:
    cluster.set_cable("node2", "down")
    cluster.until(lambda: cluster.down("node2"), 60)
    cluster.set_cable("node2", "up")


SLOW = {reach_the_time_limit_twice: 4.0}
"""Seconds an update, where not the usual ones."""
DISTURBED = [preempted, reach_the_time_limit_twice, lose_a_node, lose_the_batch_host, cut_the_network]


def test_undisturbed(cluster: Cluster, make_config: MakeConfig, tmp_path: Path, expected: dict[str, str]) -> None:
    job = Job(cluster, config(make_config, tmp_path / "run"), tasks=2)
    assert job.end() == "COMPLETED", job.text()
    assert cluster.tracking == "cgroup", "signals would reach more than they do on a real cluster"
    expected["weights"] = job.weights()
    assert len(job.launches()) == 1


@pytest.mark.parametrize("disturb", DISTURBED, ids=lambda disturb: str(disturb.__name__))
def test_disturbed(
    cluster: Cluster,
    make_config: MakeConfig,
    tmp_path: Path,
    expected: dict[str, str],
    disturb: Callable[[Cluster, Job], None],
) -> None:
    options, pace = ("--time=60", "--signal=USR1@240"), SLOW.get(disturb, 0.1)
    job = Job(cluster, config(make_config, tmp_path / "run"), *options, tasks=2, pace=pace)
    job.reach(25 if pace < 1 else 5)
    disturb(cluster, job)
    assert job.end() == "COMPLETED", job.text()
    print(disturb.__name__, [launch["update"] for launch in job.launches()], job.text().count("failure"))
    assert job.weights() == expected["weights"]
    assert len(job.launches()) >= (3 if disturb is reach_the_time_limit_twice else 2)
    ids, steps, _ = job.tracked()
    assert len(ids) == 1
    assert steps == list(range(1, UPDATES + 1)), "each once, also what W&B had in memory when the power was lost"


def test_cancelled_stays_cancelled(cluster: Cluster, make_config: MakeConfig, tmp_path: Path) -> None:
    job = Job(cluster, config(make_config, tmp_path / "run"), tasks=2)
    job.reach(25)
    cluster.call("scancel", job.number)
    assert job.end() == "CANCELLED"
    assert cluster.state(job.number) == "CANCELLED" and len(job.launches()) == 1
    assert not (job.output / "DONE").exists() and "back into the queue" not in job.text()
    print("checkpoints", sorted(path.name for path in (job.output / "checkpoints").glob("update-*")))
