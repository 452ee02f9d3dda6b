"""Folders that exist only if they are whole: a manifest with the hash of every file, written last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from train import together
from train.files import sha256

NAME = "manifest.json"


def publish(writing: Path, final: Path) -> None:
    """Give the complete folder `writing` its final name, in one step that a power cut cannot split.

    Files, manifest and folders are flushed to the disk before the rename. A folder `final` of earlier is replaced.
    """
    hashes = {str(path.relative_to(writing)): sha256(path) for path in _files(writing)}
    (writing / NAME).write_text(_text(hashes), encoding="utf-8")
    for path in [*_files(writing), writing / NAME, *(p for p in writing.rglob("*") if p.is_dir()), writing]:
        _flush(path)
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.rename(final, replaced)
    os.rename(writing, final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def problem(folder: Path) -> str | None:
    """Say what is wrong with a published folder, or None if every byte is as it was written. Reads every file."""
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
        hashes: dict[str, str] = json.loads(text)["files"]
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (ValueError, KeyError, TypeError, OSError):
        return f"{NAME} is damaged"
    if text != _text(hashes):
        return f"{NAME} is damaged"
    there = {str(path.relative_to(folder)) for path in _files(folder)}
    for name, expected in hashes.items():
        if name not in there:
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} is damaged"
    extra = sorted(there - set(hashes))
    return f"{extra[0]} does not belong there" if extra else None


def _text(hashes: dict[str, str]) -> str:
    """The manifest's only valid text: it carries its own hash, so that no byte of it can change unseen."""
    files = json.dumps(dict(sorted(hashes.items())), indent=1)
    own = hashlib.sha256(files.encode()).hexdigest()
    return f'{{"files": {files},\n"sha256": "{own}"}}\n'


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        together.goes_on()
    finally:
        os.close(descriptor)
