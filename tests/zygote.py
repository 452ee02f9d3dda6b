"""Import everything once, then fork a process for every job on standard input, a line of JSON; print its process id.

A job is {"environment": …, "output": a file for what it prints} with "config", a run, or "jobs", a file as `worker`
carries it out. "wait PID" and "poll PID" print the exit status of a child, or "running".

Starting Python and importing takes longer than most of the runs that the tests start, and killing runs at random
moments would otherwise be mostly killing imports.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
from typing import Any

import accelerate  # noqa: F401
import torch  # noqa: F401
import transformers

from tests import worker
from train import run
from train.config import validate


def main() -> None:
    """Serve until standard input ends."""
    # transformers imports lazily: these bring most of what the runs of the tests would import
    transformers.BertForSequenceClassification, transformers.GPT2LMHeadModel  # noqa: B018
    transformers.T5ForConditionalGeneration, transformers.AutoTokenizer  # noqa: B018
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.startswith(("wait", "poll")):
            how, child = line.split()
            found, status = os.waitpid(int(child), 0 if how == "wait" else os.WNOHANG)
            print(os.waitstatus_to_exitcode(status) if found else "running", flush=True)
            continue
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _begin(job)
        print(child, flush=True)


def _begin(job: dict[str, Any]) -> None:
    """Be a fresh process of its own: carry out the job and leave."""
    os.environ.clear()
    os.environ.update(job["environment"])
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()  # a process that aborts says where
    if "jobs" in job:
        worker.serve(job["jobs"])
    try:
        os._exit(run.run(validate(job["config"], "test")))
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
