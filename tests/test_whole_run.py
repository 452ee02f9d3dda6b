"""The program as a user starts it: what it prints, leaves behind and tells trackers, and what it never tells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import figures, write_config
from tests.distributed import ROOT
from tests.train.test_tracking_wandb import records

MakeConfig = Callable[..., dict[str, Any]]
CANARY = "canary-9f8e7d6c5b4a"


def start(file: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-m", "train", str(file), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.whole_run
def test_one_wandb_run_over_a_kill_and_a_stop_and_no_secret_anywhere(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        updates=150, tracking__trackers=["wandb"], tracking__mode="offline", checkpoint__every=10, evaluate__every=50
    )
    file, output = write_config(config, tmp_path / "run.yaml"), tmp_path / "out"
    secrets = {"HF_TOKEN": CANARY, "MY_SECRET": CANARY, "WANDB_API_KEY": (CANARY * 3)[:40]}
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = max(figures(output, "train/loss"), default=0) if (output / "metrics.jsonl").exists() else 0
        process = start(file, f"hub_token={CANARY}", **secrets)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            done = max(figures(output, "train/loss"), default=0) if (output / "metrics.jsonl").exists() else 0
            if done >= before + 40:
                break
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode == (-9 if number == signal.SIGKILL else 0)
        assert not (output / "DONE").exists()
    process = start(file, f"hub_token={CANARY}", **secrets)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (output / "DONE").exists()
    assert list(figures(output, "train/loss")) == list(range(1, 151))
    ids, steps = set(), []
    for part in sorted(output.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in records(part):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                entries = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                steps.append(int(entries["_step"]))
    assert len(ids) == 1
    assert steps == sorted(set(steps))
    assert steps[-1] == 150
    assert len(steps) >= 148  # a step handed over in the very moment of the kill may be lost to W&B
    leaks = [path for path in output.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert leaks == []
    assert CANARY not in printed + errors


def test_what_a_run_prints_and_leaves_behind(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(precision="fp32", evaluate__every=10, tracking__log_every=5, data__on_bad_row="skip")
    train = Path(config["data"]["train"])
    train.write_text(train.read_text() + '{"text": "", "label": "low"}\n{"text": \n')
    validation = Path(config["data"]["validation"])
    validation.write_text(validation.read_text() + '{"text": "w1", "label": "lwo"}\n')
    process = start(write_config(config, tmp_path / "run.yaml"))
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors == ""
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["task", "model", "where"]
    assert "1 process, cpu (1 threads), fp32" in lines[2]
    assert any("2 rows of train skipped, the first: " in line for line in lines)
    assert any("1 rows of validation skipped, the first: " in line and "did you mean 'low'" in line for line in lines)
    assert any(
        line.startswith("plan    20 updates of 32 examples, 5 an epoch; padding is not computed") for line in lines
    )
    assert sum(line.startswith("update ") for line in lines) == 4 + 2
    assert lines[-1].endswith(f"results in {tmp_path / 'out'}")
    output = tmp_path / "out"
    skipped = (output / "skipped_rows_train.txt").read_text().splitlines()
    assert [line.split(":")[0].split(", ")[1] for line in skipped] == ["line 152", "line 151"]
    assert {path.name for path in output.iterdir()} == {
        ".lock", "DONE", "checkpoints", "config.yaml", "launches.jsonl", "logs", "metrics.jsonl", "model",
        "predictions", "result.json", "skipped_rows_train.txt", "skipped_rows_validation.txt",
    }  # fmt: skip
    result = json.loads((output / "result.json").read_text())
    assert {"metrics", "updates", "examples", "seconds", "tokens_per_second", "padding_efficiency"} <= set(result)
    assert (result["updates"], result["examples"], result["world_size"], result["precision"]) == (20, 600, 1, "fp32")
    assert result["metrics"]["validation/accuracy"] == figures(output, "validation/accuracy")[20]
    first = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert set(first) == {"update", "train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second"}
    assert yaml.safe_load((output / "config.yaml").read_text())["batch_size"] == 32
    again = start(write_config(config, tmp_path / "run.yaml"))
    assert "this run is finished" in again.communicate(timeout=120)[0]
    assert again.returncode == 0


def caught(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.whole_run
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc to see when the handlers stand")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_in_the_imports_is_not_lost(number: int, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(updates=2000, data__validation=None)
    process = start(write_config(config, tmp_path / "run.yaml"))
    while not caught(process.pid, signal.SIGTERM):
        time.sleep(0.005)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "stopped before training; nothing is lost, and the same command goes on" in printed
    assert not (tmp_path / "out").exists(), "nothing is written yet"
