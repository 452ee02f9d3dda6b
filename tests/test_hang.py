"""One process of two stands still: the other writes down where it waits, and ends; nothing hangs for ever."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed import ROOT

TIMEOUT = 20


def test_a_process_that_stands_still(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Stopped in the middle of training (SIGSTOP), so that it can do nothing; let go of, it finds its time is up."""
    config = make_config(updates=100_000, distributed={"timeout": f"{TIMEOUT} seconds"})
    (tmp_path / "jobs.json").write_text(json.dumps([{"config": config}]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}  # fmt: skip
    command = [sys.executable, "-m", "tests.worker", str(tmp_path / "jobs.json")]
    processes = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    logs = [tmp_path / "out" / "logs" / f"rank-{rank}.log" for rank in range(2)]
    try:
        while "update 3/" not in (logs[0].read_text() if logs[0].exists() else ""):
            assert processes[0].poll() is None, "ended too early"
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert processes[0].wait(TIMEOUT + 60) == 1
        assert TIMEOUT - 2 < time.monotonic() - began < TIMEOUT + 20, "a few seconds, on a machine that is busy"
        text = logs[0].read_text()
        assert "Timeout (0:00:20)!" in text
        assert 'train/update.py", line' in text.split("Timeout (")[1]
        processes[1].send_signal(signal.SIGCONT)
        assert processes[1].wait(60) != 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert "process 1 of 2 begins: " in logs[1].read_text()
