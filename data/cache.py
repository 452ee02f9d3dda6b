"""Files made once and kept: whole or not at all, by one process while the others wait."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import pulse
from data.errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

CANNOT_WRITE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST, errno.ENOENT,
}  # fmt: skip

Notes = dict[str, Any]
"""What is known of a kept file; stands as JSON beside it."""


def kept(target: Path, make: Callable[[Path], Notes]) -> Notes:
    """Return the notes on the file `target`, made by `make` unless it was kept from an earlier call.

    `make` writes to the path that it is given and returns the notes; when it raises, nothing stays behind. Processes
    that call this together wait for the first, holding only a file lock, which the system frees if that one is
    killed. A kept file that lost its notes or part of its bytes (a full disk, a copy broken off) is made again.
    To wait is a sign of life (`pulse`) for as long as the file that is waited for grows.
    """
    from filelock import FileLock

    beside, writing = target.with_suffix(".json"), target.with_suffix(".writing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_suffix(".lock"))
        _wait(lock, writing)
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        notes = _notes(beside)
        if not target.exists() or target.stat().st_size != notes.get("bytes"):
            notes = {**make(writing), "bytes": writing.stat().st_size}
            with writing.open("rb") as stream:
                os.fsync(stream.fileno())  # a power cut could else leave a file of the right size full of zeros
            beside.write_text(json.dumps(notes), encoding="utf-8")
            os.replace(writing, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _unwritable(target, error) from error
        raise
    finally:
        writing.unlink(missing_ok=True)
        lock.release()
        pulse.beat(got_on=None)
    return notes


def _wait(lock: BaseFileLock, writing: Path) -> None:
    """Take the lock. Asks every half second whether to go on waiting; the file that grows shows that it is worth it."""
    from filelock import Timeout

    seen = -1
    while True:
        try:
            lock.acquire(timeout=0.5)
            return
        except Timeout:
            size = _size(writing)
            pulse.beat(got_on=size != seen)
            seen = size


def _size(file: Path) -> int:
    """Return the bytes of a file; 0 if it is not there, which another process may have seen to just now."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _notes(file: Path) -> Notes:
    try:
        notes = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _unwritable(target: Path, error: OSError) -> Exception:
    if error.errno not in CANNOT_WRITE:
        return error
    reason = os.strerror(error.errno or 0)
    return UserError(f"data.cache: cannot write to {target.parent}: {reason}. Choose another folder with data.cache")
