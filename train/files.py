"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train import together

READ = 2**20


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writing = file.with_name(f".{file.name}.writing")
    try:
        writing.write_text(text, encoding="utf-8")
        os.replace(writing, file)
    except OSError:  # a full disk
        writing.unlink(missing_ok=True)
        raise


def sha256(file: Path) -> str:
    """Return the sha256 of a file, with a sign of life now and then: there may be hundreds of gigabytes to read."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(READ))
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            found.update(buffer[:size])
            together.goes_on()
    return found.hexdigest()


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, indented; a number that is not finite becomes null."""
    write(file, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def write_json_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    write(file, json_lines(records))


def json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Return one JSON object a line; numbers that are not finite become null."""
    return "".join(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
