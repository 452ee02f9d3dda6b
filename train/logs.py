"""What each process has said, with the time: output/logs/rank-0.log and so on, over all resumptions."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from pathlib import Path

from data.errors import UserError
from train import watch

_said = logging.getLogger("train.said")
_said.propagate = False  # it stands on the console already
_said.setLevel(logging.INFO)
_said.addHandler(logging.NullHandler())  # else it would be said there once more, before there is a file
_handler: _File | None = None


class _File(logging.FileHandler):
    """A full disk must not fill the console as well."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def begin(output: Path) -> None:
    """Write to the file of this process in `output` from now on: what it says, warnings of all libraries, and where it
    stands should it hang. May be repeated. A file that cannot be written costs a warning."""
    global _handler
    if _handler is not None:
        return
    rank = os.environ.get("RANK", "0")
    file = output / "logs" / f"rank-{rank}.log"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _handler = _File(file, encoding="utf-8")
    except OSError as error:
        logging.getLogger("train").warning("%s cannot be written: %s", file, error.strerror)
        return
    _handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(_handler)
    _said.addHandler(_handler)
    watch.write_to(_handler.stream)
    say(f"process {rank} of {os.environ.get('WORLD_SIZE', '1')} begins: {socket.gethostname()}, pid {os.getpid()}")


def say(text: str) -> None:
    """Note what has been said on the console, or need not be said there."""
    _said.info("%s", text)


def trace(error: BaseException) -> None:
    """Note what ends the run, and where it arose."""
    _said.error("%s", error or type(error).__name__, exc_info=None if isinstance(error, UserError) else error)


def end() -> None:
    """Close the file."""
    global _handler
    if _handler is not None:
        watch.write_to(None)
        logging.getLogger().removeHandler(_handler)
        _said.removeHandler(_handler)
        with contextlib.suppress(OSError):
            _handler.close()
        _handler = None
