"""Two machines (network namespaces) without Slurm, by the README's lines: torchrun and accelerate launch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_config
from tests.slurm import network

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TORCHRUN = "torchrun --nnodes 2 --nproc-per-node 1 --node-rank {rank} --master-addr {first} --master-port 29500"
ACCELERATE = (
    "accelerate launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank {rank} --main_process_ip {first} "
    "--main_process_port 29500 --rdzv_backend static --mixed_precision no"
)


@pytest.fixture(scope="module")
def machines() -> Iterator[network.Network]:
    if reason := network.missing():
        pytest.skip(reason)
    with network.Network(["one", "two"]) as running:
        yield running


def launch(machines: network.Network, line: str, file: Path) -> None:
    """Run a line on both machines at once, as their users would."""
    path = f"{Path(sys.executable).parent}:{network.PATH}"
    variables = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    variables["ACCELERATE_USE_CPU"] = "true"
    running = []
    for rank, name in enumerate(machines.names):
        command = line.format(rank=rank, first=machines.address(1)).split()
        inside = ["ip", "netns", "exec", machines.space(name), *command, "-m", "train", str(file)]
        running.append(
            subprocess.Popen(inside, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    for process in running:
        told, _ = process.communicate(timeout=600)
        assert process.returncode == 0, told


def test_two_machines(machines: network.Network, make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Both lines, and the same weights. Last run: 2026-11-26, bit-equal."""
    found = []
    for name, line in (("torchrun", TORCHRUN), ("accelerate", ACCELERATE)):
        output = tmp_path / name
        config = make_config(updates=5, train=60, validation=9, precision="fp32", output=str(output))
        launch(machines, line, write_config(config, tmp_path / f"{name}.yaml"))
        assert '"world_size": 2' in (output / "result.json").read_text()
        found.append((output / "model" / "model.safetensors").read_bytes())
    assert found[0] == found[1]
