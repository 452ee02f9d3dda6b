"""A scheduler of its own: a random process of two is killed with kill -9 at a random moment, and the run started again.

Whatever the moments, every run ends, with the weights and figures of one that was left alone, and loses no more work
than lies between two checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import figures
from tests.test_resume import Zygote

MakeConfig = Callable[..., dict[str, Any]]

UPDATES, EVERY, WORLD = 24, 3, 2


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    serving = Zygote()
    yield serving
    serving.process.kill()
    serving.process.communicate()


def start(zygote: Zygote, config: dict[str, Any]) -> list[int]:
    """Start the processes of a run, as a launcher would; return their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD),
              "LOCAL_WORLD_SIZE": str(WORLD)}  # fmt: skip
    return [zygote.start(config, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(WORLD)]


def wait(zygote: Zygote, children: list[int]) -> list[int]:
    """Wait for the first process to fail, end the others as a launcher would, and return the exit codes."""
    codes = []
    for place, child in enumerate(children):
        codes.append(zygote.wait(child))
        if codes[-1]:
            for other in children[place + 1 :]:
                os.kill(other, signal.SIGKILL)
    return codes


def newest(output: Path) -> int:
    """The update of the newest whole checkpoint: those that are being written have other names."""
    return max((int(path.name[-8:]) for path in (output / "checkpoints").glob("update-*")), default=0)


def reached(output: Path) -> int:
    """The last update that is on record: each is logged."""
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return max((json.loads(line)["update"] for line in lines if line.endswith("\n")), default=0)


def campaign(make_config: MakeConfig, folder: Path, zygote: Zygote, kills: int) -> tuple[int, int]:
    """Kill so often; return how many runs that took, and the most updates that one kill has cost."""

    def config_of(run: str) -> dict[str, Any]:
        settings = {"updates": UPDATES, "precision": "fp32", "model__config": {}, "micro_batch_size": 6}
        return make_config(output=str(folder / run), checkpoint={"every": EVERY}, **settings)

    def outcome(output: Path) -> tuple[str, list[dict[int, float]]]:
        weights = hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()
        return weights, [figures(output, name) for name in ("train/loss", "validation/loss", "validation/accuracy")]

    began = time.monotonic()
    assert wait(zygote, start(zygote, config_of("whole"))) == [0] * WORLD
    seconds, expected = time.monotonic() - began, outcome(folder / "whole")
    generator, done, finished, most = random.Random(7), 0, 0, 0
    while done < kills:
        config = config_of(f"killed-{finished}")
        output = Path(config["output"])
        while not (output / "DONE").exists():
            children = start(zygote, config)
            hit = None
            if done < kills:
                time.sleep(generator.uniform(0, 0.9 * seconds))
                hit = generator.randrange(WORLD)
                os.kill(children[hit], signal.SIGKILL)
                children.insert(0, children.pop(hit))
            codes = wait(zygote, children)
            if hit is None or codes[0] == 0:
                assert codes == [0] * WORLD
                continue
            assert codes[0] == -signal.SIGKILL
            done += 1
            most = max(most, reached(output) - newest(output))
        finished += 1
        assert outcome(output) == expected
    return finished, most


def test_three_kills(make_config: MakeConfig, tmp_path: Path, zygote: Zygote) -> None:
    """Last run: 2026-11-26, bit-equal; on a machine so busy that all kills met the run before its first update."""
    finished, lost = campaign(make_config, tmp_path, zygote, 3)
    assert finished >= 1
    assert lost <= EVERY


@pytest.mark.slow
def test_a_hundred_kills(make_config: MakeConfig, tmp_path: Path, zygote: Zygote) -> None:
    """Never run in full so far: the machine had no time to spare for it when it was written."""
    finished, lost = campaign(make_config, tmp_path, zygote, 100)
    assert finished >= 10
    assert lost <= EVERY
