"""Precision: what is asked for, what accelerate was told, and what would have no effect."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import UserError
from tests.worker import carry_out
from train import hardware, ingredients
from train.config import validate
from train.hardware import build_accelerator, resolve

on_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without a GPU")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_a_named_precision_stays(precision: str) -> None:
    assert resolve(precision, cpu=True) == precision


def test_auto_is_bf16_only_where_the_processor_is_fast_at_it() -> None:
    file = Path("/proc/cpuinfo")
    flags = file.read_text() if file.exists() else ""
    assert resolve("auto", cpu=True) == ("bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32")


@on_cpu
def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"fp16 needs a GPU .* use bf16 or fp32"):
        build_accelerator("fp16")


@pytest.mark.parametrize(
    ("capability", "package", "backend", "told"),
    [
        (None, True, "AO", r"compute capability 8\.9 or more .* here is a CPU\. Use bf16"),
        ((8, 0), True, "AO", r"here is one of 8\.0\. Use bf16"),
        ((9, 0), False, "AO", "needs torchao 0.6.1 or newer: pip install torchao"),
        ((9, 0), True, "TE", r"another library than torchao.* fp8_config: \{backend: AO\}"),
        ((9, 0), True, "AO", None),
    ],
)
def test_fp8_where_it_cannot_be_is_refused(
    capability: tuple[int, int] | None, package: bool, backend: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setenv("ACCELERATE_FP8_BACKEND", backend)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda wanted: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr("accelerate.utils.is_torchao_available", lambda: package)
    monkeypatch.setattr("accelerate.Accelerator", lambda **settings: settings)
    if told is None:
        found: Any = build_accelerator("auto")
        assert (found[0]["mixed_precision"], found[1]) == ("fp8", "fp8")
        return
    with pytest.raises(UserError, match=told):
        build_accelerator("auto")


@on_cpu
def test_what_accelerate_was_told_wins(
    make_config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert carry_out(make_config(updates=2, precision="fp32")) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["precision"] == "bf16"


def test_attention_that_plans_anew_for_each_shape_is_out_of_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where there is a GPU to choose for."""
    chosen: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", chosen.append)
    monkeypatch.setattr("accelerate.Accelerator", lambda **settings: settings)
    for there in (False, True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda there=there: there)
        settings: Any = build_accelerator("fp32")[0]
        assert (settings["cpu"], chosen) == (not there, [False] * there)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of 8 processors, two of each core, of which 6 are ours; and the control group that we are in."""
    for number in range(8):
        topology = tmp_path / "cpus" / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    inner = tmp_path / "groups" / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.setattr(hardware, "CPUS", tmp_path / "cpus")
    monkeypatch.setattr(hardware, "_control_groups", lambda: [inner, *inner.parents])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 4, 5, 6}, raising=False)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return inner


@pytest.mark.parametrize(("processes", "threads"), [(1, 3), (2, 1), (8, 1)])
def test_a_share_of_the_cores_that_are_ours(
    processes: int, threads: int, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever torchrun says, which says 1 for several."""
    if processes > 1:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert hardware._threads() == threads
    monkeypatch.setattr(hardware, "CPUS", machine / "nowhere")  # not known: each processor may be a core
    assert hardware._threads() == max(1, 6 // processes)


@pytest.mark.parametrize(
    ("inner", "outer", "threads"),
    [("max 100000", None, 3), ("250000 100000", None, 2), ("max 100000", "100000 50000", 2), ("5000 100000", None, 1)],
)
def test_no_more_than_a_container_is_given_time_for(inner: str, outer: str | None, threads: int, machine: Path) -> None:
    (machine / "cpu.max").write_text(inner + "\n")
    if outer:
        (machine.parent / "cpu.max").write_text(outer + "\n")
    assert hardware._threads() == threads


@pytest.mark.parametrize(
    ("said", "processes", "heeded"),
    [
        ({"MKL_NUM_THREADS": "7"}, 1, True),
        ({"OMP_NUM_THREADS": "7"}, 1, True),
        ({"MKL_NUM_THREADS": "7"}, 2, True),
        ({"OMP_NUM_THREADS": "7"}, 2, False),
        ({"MKL_NUM_THREADS": ""}, 1, False),
    ],
)
def test_the_user_knows_better(
    said: dict[str, str], processes: int, heeded: bool, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch reads them when it starts."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    for name, value in {**said, "LOCAL_WORLD_SIZE": str(processes)}.items():
        monkeypatch.setenv(name, value)
    assert (hardware._threads() == 7) == heeded


THREADS = """
import accelerate, torch
from train import hardware
class Accelerator:
    def __init__(self, **settings):
        torch.set_num_threads(3)  # as it does under srun
accelerate.Accelerator = Accelerator
hardware.build_accelerator("fp32")
print(torch.get_num_threads())
"""


@on_cpu
def test_threads_are_what_the_user_said_in_a_process_that_starts() -> None:
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        variables = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | {name: "1"}
        found = subprocess.run(
            [sys.executable, "-c", THREADS], capture_output=True, check=True, text=True, env=variables
        )
        assert found.stdout == "1\n"


def test_control_groups_of_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "9:name=systemd:/\n4:memory:/a/b\n1:cpu:/c\n0::/d\n"
    real = Path.read_text

    def read(self: Path, *given: Any, **named: Any) -> str:
        return listed if self == Path("/proc/self/cgroup") else real(self, *given, **named)

    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(hardware, "GROUPS", tmp_path)
    inner = [tmp_path / "memory" / "a" / "b", tmp_path / "d"]
    assert [group for group in hardware._control_groups("memory") if group in inner] == inner
    assert tmp_path / "c" not in hardware._control_groups() and tmp_path / "d" in hardware._control_groups()


KEPT = """
import resource, sys, torch
from train import hardware
hardware.keep_memory({"kept": hardware.SMALL, "returned": hardware.SMALL + 1}[sys.argv[1]])
for _ in range(20):  # until enough is kept
    torch.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about one C library")
def test_memory_is_kept_from_one_update_to_the_next() -> None:
    """80 MB are 20,000 pages, which the system would give anew each time (or fewer, of a larger size)."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, check=True, text=True).stdout)
        for how in ("kept", "returned")
    }
    assert faults["kept"] < 100 < faults["returned"]


def test_rows_that_memory_has_no_room_for_are_read_alone(
    make_config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run that opens them; what is read then, `tests/data/test_tables.py` counts."""
    config = validate(make_config(), "test")
    for free, larger in ((2**40, False), (0, True)):
        monkeypatch.setattr(hardware, "free_memory", lambda free=free: free)
        splits = ingredients.read(config).splits
        assert {role: each.alone for role, each in splits.items()} == dict.fromkeys(splits, larger)
        hardware.forget()
