"""The output folder: whose run it is, and the files that others rely on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from data.errors import Unavailable, UserError
from train import weights
from train.config import RunConfig, changes, validate
from train.files import write

DONE = "DONE"
MODEL = "model"
CONFIG = "config.yaml"
RESULT = "result.json"
STOP = "STOP"
"""A file by which a run is asked to stop; it may be there before the run is. STOPPED once that was done."""
PATIENCE = 480
"""Seconds for which a requeued job waits until the start before has let go of its folder."""


def claim(config: RunConfig, *, resume_anyway: bool) -> bool:
    """Return whether the run in the output folder is already finished; writes nothing.

    Raises `UserError` when the folder belongs to another run, naming the keys that differ, unless `resume_anyway`.
    """
    output = Path(config.output)
    file = output / CONFIG
    if output.exists() and not output.is_dir():
        raise UserError(f"output: {output} is a file; name a folder")
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output: {output} cannot be written: no permission, or {there} is no folder")
    if not file.exists():
        if output.exists() and any(not path.name.startswith(STOP) and path.name[0] != "." for path in output.iterdir()):
            raise UserError(f"output: the folder {output} holds something that is not a run; name another folder")
        return False
    try:
        old = validate(yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
    except (UserError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"output: the folder {output} holds a run, but what it was cannot be read; name another folder. {error}"
        ) from error
    different = changes(old, config)
    if different and not resume_anyway:
        raise UserError(
            f"output: the folder {output} holds another run. These keys differ:\n  "
            + "\n  ".join(different)
            + "\nGive the values back, choose another output, or go on all the same with --resume-anyway"
        )
    return (output / DONE).exists() and not different


def check_start(config: RunConfig, *, resume_anyway: bool, speaks: bool) -> None:
    """Refuse to take a run for finished whose starting model has changed since.

    Reads the weights on every process: before a run there is no process group in which one could tell the others.
    """
    output, model = Path(config.output), config.model
    try:
        then = json.loads((output / RESULT).read_text(encoding="utf-8"))["started_from"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # removed, or of a version that did not record it
        return
    now = weights.fingerprint(model.path, model.revision) if then else None
    weights.check_same(model.path, then, now, output, anyway=resume_anyway, speaks=speaks)


def begin(config: RunConfig) -> FileLock:
    """Make the folder, with the resolved config in it; return the lock that keeps other runs out of it.

    A finished run that goes on is no longer done. Raises `UserError` while another process writes there.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock", timeout=0)
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    try:
        # on a node that was cut off a process of the start before may hang for as long as its collectives wait
        lock.acquire(timeout=PATIENCE if requeued else 0)
    except Timeout as error:
        raise Unavailable(f"output: another run is writing to {output}; wait for it, or name another folder") from error
    (output / DONE).unlink(missing_ok=True)
    write(output / CONFIG, yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True))
    return lock
