"""Import everything once, then fork a process for every line on standard input: {"config": ..., "environment": ...}.

Prints the process id of each. Killing runs at random moments would otherwise be mostly killing imports.
"""

from __future__ import annotations

import json
import os
import sys

import accelerate  # noqa: F401
import torch  # noqa: F401
import transformers

from train import run
from train.config import validate


def main() -> None:
    """Serve until standard input ends; the exit status of a child is printed when "wait PID" is asked."""
    transformers.BertForSequenceClassification, transformers.AutoTokenizer  # noqa: B018  # transformers imports lazily
    print("ready", flush=True)
    for line in sys.stdin:
        if line.startswith("wait"):
            _, status = os.waitpid(int(line.split()[1]), 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os.environ.update(job["environment"])
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(run.run(validate(job["config"], "test")))
        print(child, flush=True)


if __name__ == "__main__":
    main()
