"""Start the worker under torchrun on this machine's CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def launch(jobs: list[dict[str, Any]], world: int, folder: Path) -> None:
    """Carry out `jobs` (see `worker`) in `world` processes; raise with their output if they fail."""
    listed = folder / f"jobs-{world}.json"
    listed.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment["PYTHONFAULTHANDLER"] = "1"  # a process that aborts says where
    done = subprocess.run(
        [*command, "-m", "tests.worker", str(listed)],
        env=environment, cwd=folder, text=True, capture_output=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
