"""Where and how often a run was started: a line in `output/launches.jsonl` for every start, requeues among them."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("train")

FILE = "launches.jsonl"
LONGEST = 4096
"""Nodes to which a list is written out; a range beyond that stays as Slurm writes it."""


def record(output: Path, update: int, world: int) -> dict[str, Any]:
    """Note that the run is started, on `world` processes, from the checkpoint of `update`; return what is known of it.

    {"restarts": 1, "update": 40, "world_size": 8, "time": "2026-01-31T12:00:00+0000"}, and under Slurm {"slurm":
    {"job_id": "17", "restarts": 1, "nodes": ["a1", "a2"]}}; in an array also "array_job_id" and "array_task_id".
    Restarts are counted here, so that those by hand, in other jobs or without Slurm, count too. Nothing else about the
    machine is noted. A full disk costs a warning, not the run.
    """
    file = output / FILE
    launch: dict[str, Any] = {
        "restarts": starts(output),
        "update": update,
        "world_size": world,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime()),
    }
    if slurm := _slurm():
        launch["slurm"] = slurm
    try:
        torn = file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size > 0
        with file.open("ab") as stream:  # a line torn by a kill stays one line, and counts
            stream.write(b"\n" * torn + json.dumps(launch).encode() + b"\n")
    except OSError as error:
        log.warning("%s: this start could not be noted: %s", FILE, error)
    return launch


def starts(output: Path) -> int:
    """Return how often the run was started so far."""
    try:
        return len((output / FILE).read_bytes().splitlines())
    except OSError:
        return 0


def _slurm() -> dict[str, Any]:
    given = os.environ
    if "SLURM_JOB_ID" not in given:
        return {}
    found: dict[str, Any] = {"job_id": given["SLURM_JOB_ID"], "restarts": int(given.get("SLURM_RESTART_COUNT") or 0)}
    if nodes := given.get("SLURM_JOB_NODELIST"):
        found["nodes"] = expand(nodes)
    for name in ("array_job_id", "array_task_id"):
        if value := given.get(f"SLURM_{name.upper()}"):
            found[name] = value
    return found


def expand(nodes: str) -> list[str]:
    """Write out Slurm's list of nodes: "a[01-02,7],b" → a01, a02, a7, b. What is no such list stays."""
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        match = re.fullmatch(r"([^\[]*)\[([\d,-]+)\]([^\[]*)", part)
        if match is None:
            found.append(part)
            continue
        before, ranges, after = match.groups()
        for piece in ranges.split(","):
            first, _, last = piece.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            if len(found) + len(numbers) > LONGEST:
                return [nodes]
            found += [f"{before}{number:0{len(first)}}{after}" for number in numbers]
    return found
