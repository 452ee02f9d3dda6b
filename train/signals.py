"""How a process is asked to stop, and how it leaves.

SIGTERM, SIGUSR1 and Ctrl-C set a flag that the loop honours after the update at hand.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_requested: list[int] = []


def install() -> None:
    """Install the handlers. Called before the slow imports: a scheduler may signal a process that has just begun."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _request)


def stopping() -> bool:
    """Whether this process has been asked to stop."""
    return bool(_requested)


def leave(code: int) -> NoReturn:
    """End this process with `code`; if it belongs to a process group, past the interpreter's own finalization.

    gloo's threads outlive the group wherever DDP was used (torch 2.13). One that still holds a tensor of the last
    collective when Python is taken down aborts the process, and a finished run is reported as failed: seen twice in one
    run of the tests on a busy machine, and at https://github.com/pytorch/pytorch/pull/179291.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    distributed.destroy_process_group()
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _request(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and signal.SIGINT in _requested:
        raise KeyboardInterrupt  # Ctrl-C a second time: at once, without a checkpoint
    _requested.append(number)
