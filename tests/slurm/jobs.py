"""Jobs of `slurm/train.sbatch` on a cluster of ours: submitted, disturbed, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.conftest import figures, write_config
from tests.slurm.cluster import Cluster
from train.wandb_files import records

ROOT = Path(__file__).parents[2]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}


class Job:
    """A run of `config` in a job of its own, with its log and its output folder."""

    def __init__(
        self, cluster: Cluster, config: dict[str, Any], *options: str, tasks: int = 1, nodes: int = 2, pace: float = 0.1
    ) -> None:
        self.cluster, self.output = cluster, Path(config["output"])
        self.log = self.output.with_suffix(".log")
        file = write_config(config, self.output.with_suffix(".yaml"))
        cluster.variables["PATH"] = f"{Path(sys.executable).parent}:{cluster.variables['PATH']}"
        cluster.variables |= {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT / "tests" / "slurm" / "pace"),
            "PACE": str(pace),
        }
        shape = [f"--nodes={nodes}", "--gpus-per-node=0", f"--ntasks-per-node={tasks}", f"--output={self.log}"]
        script = str(ROOT / "slurm" / "train.sbatch")
        self.number = cluster.call(
            "sbatch",
            "--parsable",
            f"--chdir={file.parent}",
            *shape,
            *options,
            script,
            file.name,
            "tracking.log_every=1",
        )

    def updates(self) -> int:
        """Return the last update of which there are figures."""
        try:
            return max(figures(self.output, "train/loss"), default=0)
        except (FileNotFoundError, json.JSONDecodeError):
            return 0

    def reach(self, update: int, seconds: float = 900) -> None:
        """Wait until the run has made an update."""
        try:
            self.cluster.until(lambda: self.updates() >= update or self.has_ended(), seconds)
            assert self.updates() >= update
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from error

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def has_ended(self) -> bool:
        return self.cluster.state(self.number) in ENDED

    def end(self, seconds: float = 1500) -> str:
        """Wait until the job has ended for good; return its state."""
        limit = time.monotonic() + seconds
        ended = 0
        while ended < 5:  # a state may be passed through on the way to the queue
            assert time.monotonic() < limit, f"still {self.cluster.state(self.number)}\n{self.text()}"
            ended = ended + 1 if self.has_ended() else 0
            time.sleep(0.3)
        return self.cluster.state(self.number)

    def weights(self) -> str:
        return hashlib.sha256((self.output / "model" / "model.safetensors").read_bytes()).hexdigest()

    def launches(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / "launches.jsonl").read_text().splitlines()]

    def tracked(self) -> tuple[set[str], list[int], list[dict[str, Any]]]:
        """Return the ids, the steps and the configs that the offline segments of W&B hold, in order."""
        ids, steps, configs = set(), list[int](), []
        for file in sorted((self.output / "wandb").glob("*/*.wandb"), key=lambda file: file.stat().st_mtime):
            for record in records(file):
                match record.WhichOneof("record_type"):
                    case "run":
                        ids.add(record.run.run_id)
                    case "history":
                        found = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                        steps.append(int(found["_step"]))
                    case "config":
                        configs.append({item.key: json.loads(item.value_json) for item in record.config.update})
        return ids, steps, configs


def preempt(cluster: Cluster, nodes: int = 2, seconds: int = 2) -> None:
    """Submit a job of a higher priority that takes all of the nodes for a while."""
    cluster.call(
        "sbatch", "-p", "high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "--wrap", f"sleep {seconds}"
    )
