"""Start processes of the tests without the price of starting Python: they are forked from one that has imported all."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Zygote:
    """Forks runs from a process that has imported everything (see `zygote`)."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.ask(None) == "ready"

    def ask(self, line: str | None) -> str:
        assert self.process.stdin and self.process.stdout
        if line is not None:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def start(self, job: dict[str, Any], environment: dict[str, str] | None = None, output: str = os.devnull) -> int:
        """Start a job, {"config": …} or {"jobs": file}, with these additions to the environment; return its id."""
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
        return int(self.ask(json.dumps({**job, "environment": variables, "output": output})))

    def wait(self, child: int) -> int:
        """Return the exit status of a process, once it has ended."""
        return int(self.ask(f"wait {child}"))

    def poll(self, child: int) -> int | None:
        """Return the exit status of a process, or None while it runs."""
        answer = self.ask(f"poll {child}")
        return None if answer == "running" else int(answer)

    def end(self) -> None:
        """End the process that forks."""
        self.process.kill()
        self.process.communicate()


@cache
def zygote() -> Zygote:
    """Return the one that all tests of this process share."""
    serving = Zygote()
    atexit.register(serving.end)
    return serving


def launch(jobs: list[dict[str, Any]], world: int, folder: Path) -> None:
    """Carry out `jobs` (see `worker`) in `world` processes; raise with their output if they fail.

    As torchrun would: a store of this process is where they meet, and when one fails the others are ended. torchrun
    itself is started where the command line is tested.
    """
    from torch.distributed import TCPStore

    listed = folder / f"jobs-{world}.json"
    listed.write_text(json.dumps(jobs))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    outputs = [folder / f"output-{world}-{rank}.txt" for rank in range(world)]
    running = {
        zygote().start({"jobs": str(listed)}, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(output))
        for rank, output in enumerate(outputs)
    }
    deadline, codes = time.monotonic() + 500, list[int]()
    while running:
        time.sleep(0.02)
        for child in list(running):
            code = zygote().poll(child)
            if code is not None:
                running.remove(child)
                codes.append(code)
        if any(codes) or time.monotonic() > deadline:
            for child in running:
                os.kill(child, 9)
                zygote().wait(child)
            running, codes = set(), [*codes, 1]
    assert not any(codes), "".join(f"{output.name}:\n{output.read_text()[-4000:]}" for output in outputs)
