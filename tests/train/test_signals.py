"""How a process leaves: with its exit code, its output and its atexit handlers, whatever threads are still there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import ROOT

PROGRAM = """
import atexit, os, sys
import torch
from train import signals

class Finalized:
    def __del__(self):
        print("finalized")

kept = sys.last_value = Finalized()  # let go of only when the interpreter is taken down
atexit.register(print, "at exit")
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    model(torch.ones(3, 2)).sum().backward()
print("last words", end=" ")
signals.leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 3])
def test_alone_a_process_leaves_as_ever(code: int, tmp_path: Path) -> None:
    done = run([], code, tmp_path)
    assert done.returncode == code
    assert done.stdout == "last words at exit\nfinalized\n"


@pytest.mark.whole_run
@pytest.mark.parametrize("code", [0, 3])
def test_of_several_each_leaves_before_python_is_taken_down(code: int, tmp_path: Path) -> None:
    done = run(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], code, tmp_path)
    assert (done.returncode == 0) == (code == 0)
    assert done.stdout.count("last words") == done.stdout.count("at exit") == 2
    assert "finalized" not in done.stdout
    assert f"exitcode  : {code}" in done.stderr or code == 0
    assert "destroy_process_group" not in done.stderr


def run(launcher: list[str], code: int, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "program.py", str(code)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
