"""What is told before a job is submitted: by train.submit, train.grid and the scripts; with a stand-in for sbatch."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.errors import UserError
from train import accelerate_file, file_systems, grid, launches, network, submit

ROOT = Path(__file__).parents[2]
NFS, LOCAL = "server:/home /home nfs4 rw 0 0", "/dev/sda1 / ext4 rw 0 0"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"{LOCAL}\nserver:/x {tmp_path.resolve()} nfs rw 0 0\n")
    monkeypatch.setattr(file_systems, "MOUNTS", mounts)
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n')
    content: dict[str, Any] = {
        "output": str(tmp_path / "out"), "epochs": 1, "task": "text_classification", "model": {"path": "some/model"},
        "data": {"train": str(tmp_path / "rows.jsonl")},
    }  # fmt: skip
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("name", ["train.sbatch", "sweep.sbatch", "stages.sh", "environment.sh"])
def test_the_scripts_can_be_read_by_bash(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "slurm" / name)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", str(ROOT / "slurm" / name)], check=True)


def test_dry_run_prints_command_and_script(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2", "--gpus-per-node", "8", "--time", "4:00:00", "--qos=high", "--dry-run"]
    assert submit.main([file, *options, "optim.lr=1e-5"]) == 0
    told = capsys.readouterr()
    assert "2 nodes × 8 processes share batches of 32 examples: about 2 each" in told.out and told.err == ""
    shape = "sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --time=4:00:00 --qos=high"
    assert f"{shape} {submit.SCRIPT} {file} optim.lr=1e-5\n" in told.out
    assert told.out.endswith(submit.SCRIPT.read_text())


def test_how_a_model_is_spread_goes_with_the_job(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main([file, "--gpus-per-node", "8", "--dry-run", "--accelerate-config", "fsdp2"]) == 0
    there = ROOT / "accelerate_configs" / "fsdp2.yaml"
    assert f"env ACCELERATE_CONFIG={there} sbatch --nodes=1 " in capsys.readouterr().out
    assert accelerate_file.main([str(there)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert {"ACCELERATE_USE_FSDP=true", "FSDP_VERSION=2", "ACCELERATE_MIXED_PRECISION=bf16"} <= set(told)
    assert all("=" in line and not line.startswith(("RANK", "MASTER", "WORLD_SIZE", "PATH")) for line in told)
    assert accelerate_file.main(["fsdp"]) == 2
    assert "there is no accelerate config 'fsdp'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accelerate-config", "fsd2"], "there is no accelerate config 'fsd2'"),
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["--nodes", "0"], "--nodes: 0 must be at least 1"),
        (["--gpus-per-node", "-1"], "--gpus-per-node: -1 must be at least 0"),
        (["--ntasks-per-node", "4"], "every GPU needs one process"),
        (["--nodes", "5"], "batch_size: 32 examples cannot be shared by 40 processes"),
        (["--time", "four hours"], "is no time; Slurm reads"),
        (["--time", "10"], "no longer than the 10 minutes"),
        (["--time", "0:30", "--signal=USR1@30"], "no longer than the 1 minutes"),
        (["hub_token=hf_CANARY"], "set HF_TOKEN"),
        (["--exclude", "n1"], "'n1': after the config file come key=value pairs"),
        (["data.train=nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (["output=/dev/shm/out"], "output: /dev/shm/out is on this machine alone"),
    ],
)
def test_refused(file: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert submit.main([file, "--gpus-per-node", "8", "--dry-run", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and "CANARY" not in told


def test_a_disk_of_this_machine_is_told(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main([file, "--gpus-per-node", "1", "--dry-run", "output=/srv/out"]) == 0
    assert "warning: output: /srv/out is on ext4" in capsys.readouterr().err
    assert submit.main([file, "--gpus-per-node", "1", "--dry-run", "output=/dev/shm/out", "--local-anyway"]) == 0


def test_slurm_refuses_or_is_not_there(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main([file, "--gpus-per-node", "1"]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    for name, text in (
        ("sbatch", "echo no account >&2; exit 1"),
        ("sinfo", "printf 'gpu|gpu:a100:4(S:0)\\ncpu|(null)\\n'"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    assert submit.main([file, "--gpus-per-node", "1"]) == 2
    assert "Slurm refuses the job: no account" in capsys.readouterr().err
    assert submit.main([file, "--gpus-per-node", "8", "--partition", "gpus"]) == 2
    assert "there is no 'gpus'; there are cpu, gpu; did you mean" in capsys.readouterr().err
    assert submit.main([file, "--gpus-per-node", "8", "--partition", "gpu"]) == 2
    assert "the nodes of gpu have 4 at most, not 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("1:30", 2), ("4:00:00", 240), ("1-0", 1440), ("1-1:30", 1530), ("0-0:0:1", 1), ("UNLIMITED", None)],
)
def test_times(time: str, expected: int | None) -> None:
    assert submit.minutes(time) == expected


def test_grid(file: str, tmp_path: Path) -> None:
    assert grid.runs(file, ["seed=1,2"])[0] == [file, "seed=1", f"output={tmp_path / 'out-sweep' / 'seed=1'}"]
    tracked = "tracking.trackers=[wandb]"
    found = grid.runs(file, ["optim.lr=1e-5,3e-5", tracked, "seed=1,2"])
    assert len(found) == 4
    folder = tmp_path / "out-sweep"
    assert found[1] == [
        file, "optim.lr=1e-5", tracked, "seed=2", f"output={folder}/optim.lr=1e-5_seed=2",
        "tracking.group=out",
    ]  # fmt: skip
    for given, message in (
        (["seed=1"], "nothing varies"),
        (["seed=1,1"], "given twice"),
        (["seed=1,x"], "seed"),
        (["output=a,b"], "one folder"),
    ):
        with pytest.raises(UserError, match=message):
            grid.runs(file, given)


def test_grid_knows_its_array(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert grid.main([file, "seed=1,2,3"]) == 0
    assert "sbatch --array=0-2 slurm/sweep.sbatch" in capsys.readouterr().out
    spaced = [file, "seed=1,2", "optim.betas=[0.9, 0.99],[0.9, 0.95]"]
    assert grid.main(spaced) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line) == ["sbatch", "--array=0-3", "slurm/sweep.sbatch", *spaced]
    assert grid.main([file, "seed=1,2,3", "--index", "3"]) == 2
    assert "there is no run 3: submit the array with --array=0-2" in capsys.readouterr().err
    assert grid.main([file, "seed=1,2,3", "--index", "1"]) == 0
    assert capsys.readouterr().out.split("\0")[1] == "seed=2"


def test_nodes_are_written_out() -> None:
    assert launches.expand("a[01-03,7],b,c[1-2]x") == ["a01", "a02", "a03", "a7", "b", "c1x", "c2x"]
    assert launches.expand("odd[x]") == ["odd[x]"]


def test_launches_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert launches.record(tmp_path, 0, 2)["restarts"] == 0
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    with (tmp_path / launches.FILE).open("a") as stream:
        stream.write('{"torn')
    launch = launches.record(tmp_path, 20, 2)
    assert launch["restarts"] == 2 and launches.starts(tmp_path) == 3
    assert launch["slurm"] == {"job_id": "7", "restarts": 2, "nodes": ["n1", "n2"]}


def test_the_way_to_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.interface_towards("127.0.0.1") == "lo"
    assert network.interface_towards("no.such.host.invalid") is None
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    network.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
