"""What slurm/train.sbatch makes of the ways in which processes end, and slurm/sweep.sbatch of a sweep at W&B.

With stand-ins for Slurm, for the trainer and for W&B's agent.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.errors import Unavailable, UserError
from train import __main__ as command_line
from train import signals

ROOT = Path(__file__).parents[2]
SCONTROL = """
case "$1 $2" in
  "show job") echo "   Command=$HERE/slurm/train.sbatch x.yaml" ;;
  "show hostnames") echo node1 ;;
  "show node") echo "NodeAddr=127.0.0.1" ;;
  "requeue 7") echo requeued >> "$HERE/requeued" ;;
esac
"""
SRUN = """
while [[ "$1" == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 "$@"
"""
PYTHON = """
case "$*" in
  *accelerate_file*) [ "$3" = ddp ] || exit 2; echo ACCELERATE_SAID=yes; echo FSDP_VERSION=2 ;;
  *train.grid*) PYTHONPATH="$ROOT" exec "$REAL" "$@" ;;
  *--unfinished*) [ -e "$HERE/out/DONE" ] || echo "$HERE/out" ;;
  *) eval "$TRAINER" ;;
esac
"""
AGENT = """
echo "$*" >> "$HERE/asked"
export WANDB_RUN_ID=r4nd0m WANDB_SWEEP_ID=abc
bash "$LOCKSTEP/slurm/sweep.sbatch" x.yaml optim.lr=3e-05 "seed=2"
exit 0
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")  # beside no environment of Python, which it would take
    programs = {"scontrol": SCONTROL, "srun": SRUN, "python": PYTHON, "scancel": "", "wandb": AGENT}
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "node1", "NTASKS": "2", "NTASKS_PER_NODE": "2", "SUBMIT_DIR": str(tmp_path)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {
        **kept, **{f"SLURM_{name}": value for name, value in slurm.items()}, "HERE": str(tmp_path), "MAX_FAILURES": "3",
        "PATH": f"{folder}:{os.environ['PATH']}", "ROOT": str(ROOT), "REAL": sys.executable,
    }  # fmt: skip


def submit(variables: dict[str, str], trainer: str, script: str = "train") -> subprocess.CompletedProcess[str]:
    arguments = ["x.yaml"] if script == "train" else []
    return subprocess.run(
        ["bash", f"{variables['HERE']}/slurm/{script}.sbatch", *arguments], env={**variables, "TRAINER": trainer},
        text=True, cwd=variables["HERE"], capture_output=True, timeout=60,
    )  # fmt: skip


def failures(variables: dict[str, str]) -> str:
    file = Path(variables["HERE"], "out", ".failures")
    return file.read_text().split()[0] if file.exists() else "0"


def test_a_mistake_ends_the_job(stand_ins: dict[str, str], tmp_path: Path) -> None:
    """Also where srun shows the code of a process that it has ended because of the one with the mistake."""
    done = submit(stand_ins, 'mkdir -p "$HERE/out"; echo 2 > "$LOCKSTEP_ENDING"; exit 137')
    assert done.returncode == 2 and "something has to be mended first" in done.stdout
    assert not (tmp_path / "requeued").exists() and failures(stand_ins) == "0"
    assert not list((tmp_path / "out").iterdir()), "nothing is left that another start would read"


def test_what_an_earlier_start_was_stopped_by_is_over(stand_ins: dict[str, str], tmp_path: Path) -> None:
    """A start that fails before it could say so itself is a failure, not a stop."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "STOPPED").touch()
    done = submit(stand_ins, "exit 1")
    assert done.returncode == 0 and "stopped by the file" not in done.stdout
    assert failures(stand_ins) == "1" and (tmp_path / "requeued").exists()


def test_one_that_has_to_begin_anew_is_no_failure(stand_ins: dict[str, str], tmp_path: Path) -> None:
    for time in (1, 2, 3, 4):
        done = submit(stand_ins, 'mkdir -p "$HERE/out"; echo 75 > "$LOCKSTEP_ENDING"; exit 75')
        assert done.returncode == 0 and "no failure" in done.stdout
        assert (tmp_path / "requeued").read_text().count("requeued") == time
    assert failures(stand_ins) == "0"


def test_an_accelerate_config_reaches_the_processes(stand_ins: dict[str, str], tmp_path: Path) -> None:
    trainer = 'mkdir -p "$HERE/out"; echo "$ACCELERATE_SAID $FSDP_VERSION" > "$HERE/out/DONE"'
    done = submit({**stand_ins, "ACCELERATE_CONFIG": "nothing"}, trainer)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    done = submit({**stand_ins, "ACCELERATE_CONFIG": "ddp"}, trainer)
    assert done.returncode == 0 and "spread as ddp says" in done.stdout
    assert (tmp_path / "out" / "DONE").read_text() == "yes 2\n"


def test_a_crash_is_one(stand_ins: dict[str, str], tmp_path: Path) -> None:
    for time in (1, 2):
        assert submit(stand_ins, 'mkdir -p "$HERE/out"; exit 1').returncode == 0
        assert failures(stand_ins) == str(time)
    done = submit(stand_ins, "exit 1")
    assert done.returncode == 1 and "failure 3 of 3" in done.stdout
    assert (tmp_path / "requeued").read_text().count("requeued") == 2
    assert submit(stand_ins, 'touch "$HERE/out/DONE"').returncode == 0


@pytest.mark.parametrize(
    ("error", "code", "written"),
    [(UserError("x"), 2, "2\n"), (signals.Again("x"), 75, "75\n"), (Unavailable("x"), 1, None)],
)
def test_what_a_process_says(
    error: Exception, code: int, written: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise error

    file = tmp_path / "out" / ".ending"
    monkeypatch.setattr(command_line, "_run", fail)
    assert command_line.main(["x.yaml"]) == code, "nobody asked for a file"
    monkeypatch.setenv(signals.ENDING, str(file))
    assert command_line.main(["x.yaml"]) == code
    assert (file.read_text() if file.exists() else None) == written
    signals.tell_ending(signals.AGAIN)
    assert file.read_text() == (written or "75\n"), "what has to be mended stays"
    signals.tell_ending(signals.MEND)
    assert file.read_text() == "2\n"


def test_a_sweep_at_wandb(stand_ins: dict[str, str], tmp_path: Path) -> None:
    """The agent is asked for one run; that is preempted, and goes on as the same one without asking again."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n')
    config = {
        "output": str(tmp_path / "out"), "epochs": 1, "task": "text_classification", "model": {"path": "some/model"},
        "data": {"train": str(tmp_path / "rows.jsonl")}, "tracking": {"trackers": ["wandb"]},
    }  # fmt: skip
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    array = {"ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "3"}
    variables = {**stand_ins, **{f"SLURM_{name}": value for name, value in array.items()}, "SWEEP_ID": "me/mine/abc"}
    trainer = 'mkdir -p "$HERE/out"; echo "$WANDB_RUN_ID $WANDB_SWEEP_ID $*" >> "$HERE/trained"; '
    requeue = tmp_path / "bin" / "scontrol"
    requeue.write_text(requeue.read_text().replace("requeue 7", "requeue 7_3"))
    done = submit(variables, trainer + "exit 0", "sweep")
    assert done.returncode == 0 and "back into the queue" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "requeued").exists()
    done = submit(variables, trainer + 'touch "$HERE/out/DONE"', "sweep")
    assert done.returncode == 0 and "lockstep: finished" in done.stdout, done.stdout + done.stderr
    first, second = (tmp_path / "trained").read_text().splitlines()
    assert first == second == f"r4nd0m abc -m train x.yaml optim.lr=3e-05 seed=2 output={tmp_path}/out-sweep/r4nd0m"
    assert (tmp_path / "asked").read_text() == "agent --count 1 me/mine/abc\n", "once"
    (tmp_path / "out" / "DONE").unlink()
    (tmp_path / ".lockstep-sweep-7_3").unlink()
    done = submit(variables, 'mkdir -p "$HERE/out"; echo 2 > "$LOCKSTEP_ENDING"; exit 2', "sweep")
    assert done.returncode == 2, "which the agent hides"
    config["tracking"] = {"trackers": []}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / ".lockstep-sweep-7_3").unlink()
    done = submit(variables, trainer, "sweep")
    assert done.returncode == 2 and "add wandb" in done.stderr
