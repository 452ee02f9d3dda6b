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

import pytest

from tests.distributed import ROOT

TIMEOUT = 20


@pytest.mark.whole_run
def test_a_process_that_stands_still(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Stopped in the middle of training (SIGSTOP), so that it can do nothing; let go of, it finds its time is up."""
    settings = {"data__validation": None, "checkpoint": {"every": 100_000}}  # so that it is in an update
    config = make_config(updates=100_000, distributed={"timeout": f"{TIMEOUT} seconds"}, **settings)
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


PROGRAM = """
import sys, time
from pathlib import Path

import torch
from accelerate import Accelerator
from train import manifest, shards, together, watch
from train.background import Background
from train.checkpoint import Checkpoints

accelerator, folder = Accelerator(cpu=True), Path(sys.argv[1])
first = accelerator.is_main_process
tensors = {f"weight{number}": torch.ones(3) for number in range(25)}
if first:
    for number in range(25):
        (folder / "checkpoints" / "writing").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "writing" / str(number)).write_text("x")
    manifest.publish(folder / "checkpoints" / "writing", folder / "checkpoints" / "update-00000007")
shards.save(tensors, folder / "model")
watch.begin(SECONDS)
watch.beat()
real = together.goes_on
if first:  # as if its disk were slow
    together.goes_on = lambda: (time.sleep(0.25), real())
began = time.monotonic()
settings = dict(keep=2, best=None, higher_is_better=True, patience=None)
checkpoints = Checkpoints(folder / "checkpoints", accelerator, None, **settings)
assert checkpoints.newest() == 7
assert time.monotonic() - began > SECONDS + 1
together.goes_on, began = (real if first else lambda: (time.sleep(0.25), real())), time.monotonic()
found = {name: torch.zeros(3) for name in tensors}
shards.load(found, folder / "model")
assert time.monotonic() - began > SECONDS + 1 and all(each.sum() == 3 for each in found.values())
print("resumed", flush=True)
watch.rest()
with together.alive():
    time.sleep(0 if first else SECONDS + 2)  # as if it were downloading a model
together.meet(False)
print("met", flush=True)
watch.rest()
background = Background(accelerator)
background.begin([lambda: time.sleep(0 if first else SECONDS + 2)], print)  # as if it had much to write
assert background.end() == ""
print("written", flush=True)
if first:
    background.begin([lambda: None], print)
    try:
        background.end()
    except TimeoutError:
        print("given up", flush=True)
if not first:
    time.sleep(3 * SECONDS)  # as if its machine had died: its kernel answers nobody
    raise SystemExit
together.meet(False)
"""


HANGS = """
import sys, time
from accelerate import Accelerator
from train import watch
from train.background import Background

accelerator = Accelerator(cpu=True)
background = Background(accelerator)
watch.begin(SECONDS)
watch.beat()
background.begin([lambda: time.sleep(0 if accelerator.is_main_process else 600)], print)  # as if its disk had gone
for number in range(3 * SECONDS):  # training goes on, and is not disturbed
    time.sleep(1)
    watch.beat()
print("saves next", flush=True)
background.end()
"""

WRITES = """
import sys, time
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs
from train import stages, together, watch

patience = InitProcessGroupKwargs(timeout=timedelta(seconds=SECONDS))
accelerator = Accelerator(cpu=True, kwargs_handlers=[patience])
watch.begin(SECONDS)
watch.rest()
with together.alive():
    time.sleep(3 * SECONDS if accelerator.is_main_process else 0)  # as if it wrote a large model
assert stages._settle(0, Path(sys.argv[1])) == (0, False, False)
print("settled", flush=True)
"""


@pytest.mark.slow
def test_the_next_stage_waits_for_what_the_first_process_writes(tmp_path: Path) -> None:
    """However long it takes: a collective would fail after the timeout."""
    processes, told = _both(WRITES.replace("SECONDS", "2"), tmp_path)
    assert [process.returncode for process in processes] == [0, 0], told
    assert all("settled" in each for each in told)


@pytest.mark.slow
def test_who_waits_knows_slow_from_dead(tmp_path: Path) -> None:
    """One that reads for longer than the timeout when a run goes on is waited for, as a download is; not a dead one."""
    seconds = 4
    processes, told = _both(PROGRAM.replace("SECONDS", str(seconds)), tmp_path)
    assert all("resumed\nmet\nwritten\n" in each for each in told), told
    assert "given up\n" in told[0], told[0]
    assert processes[0].returncode == 1
    assert f"TimeoutError: another process has given no sign of life for {seconds} seconds: it has died" in told[0]


@pytest.mark.slow
def test_a_checkpoint_whose_writing_hangs(tmp_path: Path) -> None:
    """Who hangs writes where, and ends; who waits for it says so. Both once somebody waits for the checkpoint."""
    began = time.monotonic()
    processes, told = _both(HANGS.replace("SECONDS", "2"), tmp_path)
    assert time.monotonic() - began < 60
    assert all("saves next\n" in each for each in told), told
    assert processes[1].returncode == 1 and "Timeout (0:00:02)!" in told[1] and 'program.py", line 11 in' in told[1]
    assert processes[0].returncode == 1 and "TimeoutError: another process has given no sign of life" in told[0]


def _both(program: str, folder: Path) -> tuple[list[subprocess.Popen[str]], list[str]]:
    """Carry out a program on two processes; return them and what each said."""
    (folder / "program.py").write_text(program)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                   "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "program.py", str(folder)], cwd=folder, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        return processes, [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
