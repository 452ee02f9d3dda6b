"""How a process is asked to stop, and how it leaves.

SIGTERM, SIGUSR1, Ctrl-C and a file (`obey`) set a flag that every phase of a run looks at. It is set for good: who has
been asked leaves soon.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

LOOK = 1.0
"""Seconds between two looks at what costs more than a look at memory: the file, and what other processes say."""

_KEY = "lockstep/stop"
_requested: list[int] = []
_told = False
_file: Path | None = None
_looked = float("-inf")


class Stopped(Exception):
    """This process was asked to stop, and the work at hand is given up. Nothing is lost: it can be done again."""


class Again(Exception):
    """This run cannot go on, but will when it is started again: nothing has to be mended first."""


MEND, AGAIN = 2, 75
"""Exit codes: something to mend, without which another start is in vain; `Again` (sysexits.h has it as EX_TEMPFAIL)."""
ENDING = "LOCKSTEP_ENDING"
"""The variable by which a job script names a file that gets the exit code of a process that chose to end in one of
these ways: of the codes themselves a launcher shows only one, perhaps of a process that it has ended thereupon."""


def install() -> None:
    """Install the handlers. Called before the slow imports: a scheduler may signal a process that has just begun."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _request)


def obey(file: Path) -> None:
    """Take the existence of `file` for a request to stop. The first process looks at it, and tells the others."""
    global _file
    _file = file if os.environ.get("RANK", "0") == "0" else None
    if _file is not None:
        _honoured(_file).unlink(missing_ok=True)


def honoured() -> None:
    """Rename the file, so that the same command goes on; on the process that looks at it. It counts all the same.

    By its new name a job script knows that the run is not to be started again by itself.
    """
    if _file is not None and _file.exists():
        _requested.append(0)
        _file.replace(_honoured(_file))


def _honoured(file: Path) -> Path:
    return file.with_name("STOPPED")


def stopping() -> bool:
    """Whether this process has been asked to stop, or knows that another one has.

    The others know within about a second, in no particular order: where all must act alike, they have to agree
    (`together.anyone`).
    """
    global _looked
    now = time.monotonic()
    if not _requested and now - _looked >= LOOK:
        _looked = now
        if (_file is not None and _file.exists()) or _is_told():
            _requested.append(0)
    if _requested:
        _tell()
    return bool(_requested)


def store() -> Any:
    """Return the key-value store that all processes of the group share, or None if there is no group."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def tell_ending(code: int) -> None:
    """Write MEND or AGAIN into the file that the job script asks for, if it does. MEND stays, whatever others say."""
    if name := os.environ.get(ENDING):
        with contextlib.suppress(OSError):  # then it counts as a crash
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            with open(name, "w" if code == MEND else "x", encoding="ascii") as stream:
                stream.write(f"{code}\n")


def leave(code: int) -> NoReturn:
    """End this process with `code`; if it belongs to a process group, past the interpreter's own finalization.

    gloo's threads outlive the group wherever DDP was used (torch 2.13). One that still holds a tensor of the last
    collective when Python is taken down aborts the process, and a finished run is reported as failed: seen twice in one
    run of the tests on a busy machine, and at https://github.com/pytorch/pytorch/pull/179291. After a failure the group
    is not taken down: others may be in the middle of a collective, and that would wait for them.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    if code == 0:
        distributed.destroy_process_group()
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_told() -> bool:
    shared = store()
    try:
        return shared is not None and bool(shared.check([_KEY]))
    except RuntimeError:  # the process that holds the store has gone
        return False


def _tell() -> None:
    """Let the others know, once."""
    global _told
    shared = None if _told else store()
    if shared is not None:
        _told = True
        with contextlib.suppress(RuntimeError):  # the process that holds the store has gone
            shared.set(_KEY, "1")


def _request(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and signal.SIGINT in _requested:
        raise KeyboardInterrupt  # Ctrl-C a second time: at once, without a checkpoint
    _requested.append(number)
