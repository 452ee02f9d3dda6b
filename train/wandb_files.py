"""What W&B's local files hold of a run: what a kill caught on its way to them was handed over, but is not there.

A .wandb file is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind a header of seven
bytes: blocks of 32 KiB; a record is cut into parts where a block ends, each behind its checksum, length and kind. The
checksum is the usual CRC-32, of kind and part.
"""

from __future__ import annotations

import glob
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN = b":W&B\xe1\xbe\x00"
HEADER = len(BEGIN)
BLOCK = 2**15
TAIL = 64 * BLOCK
"""What is read of the end of a file at first: a long run's file has gigabytes."""

_PART = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(1, 5)


def last_step(folder: Path, run_id: str, newest: Path) -> int | None:
    """Return the highest step that the files of a run hold, -1 if they hold none; None if none is of a known format.

    folder: where W&B keeps its runs. newest: the folder in it of the start that has just begun, which is not asked.
    """
    there = [file for file in folder.glob(f"*/run-{glob.escape(run_id)}.wandb") if file.parent != newest]
    return max(map(_last, filter(_known, there)), default=None)


def _known(file: Path) -> bool:
    with file.open("rb") as stream:
        return BEGIN.startswith(stream.read(HEADER))


def _last(file: Path) -> int:
    end = max(0, file.stat().st_size - TAIL) // BLOCK * BLOCK
    step = max(steps(file, end), default=-1)
    return max(steps(file), default=-1) if step < 0 and end else step


def steps(file: Path, begin: int = 0) -> Iterator[int]:
    """Yield the steps of all figures that a file holds from the block at `begin` on."""
    for record in records(file, begin):
        if record.HasField("history"):
            found = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "_step" in found:
                yield int(found["_step"])


def records(file: Path, begin: int = 0) -> Iterator[Any]:
    """Yield the records that begin in the block at `begin` or after it, up to the first that a kill has torn."""
    from wandb.proto import wandb_internal_pb2

    kind_of_record: Any = getattr(wandb_internal_pb2, "Record")  # noqa: B009 (its stubs do not have it)
    with file.open("rb") as stream:
        stream.seek(begin)
        content = stream.read()
    position, parts = 0 if begin else HEADER, list[bytes]()
    while position + _PART.size <= len(content):
        room = BLOCK - position % BLOCK
        if room < _PART.size:
            position += room
            continue
        checksum, length, kind = _PART.unpack_from(content, position)
        position += _PART.size + length
        part = content[position - length : position]
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            return
        if kind in (_WHOLE, _FIRST):
            parts = []
        elif not parts:  # of a record that began before
            continue
        parts.append(part)
        if kind in (_WHOLE, _LAST):
            yield kind_of_record.FromString(b"".join(parts))
            parts = []
