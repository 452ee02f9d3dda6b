"""What is written beside an exported model for ourselves, in one file: what no other program asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.files import write_json

FILE = "lockstep.json"


def note(folder: Path, **entries: Any) -> None:
    """Add entries to the notes in `folder`; those of the same name are replaced."""
    write_json(folder / FILE, {**read(folder), **entries})


def read(folder: Path) -> dict[str, Any]:
    """Return the notes in `folder`: {} where there are none."""
    file = folder / FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found
