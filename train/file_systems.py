"""Whether the folders of a run are on a file system that all nodes of a cluster share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data.source import check_there
from train.config import RunConfig

MOUNTS = Path("/proc/mounts")
SHARED = re.compile(r"nfs4?|lustre|gpfs|beegfs\S*|ceph|cifs|smb3|wekafs|panfs|pvfs2|orangefs|afs|9p|virtiofs|fuse\..+")
OF_ONE_MACHINE = {"tmpfs", "ramfs", "devtmpfs", "overlay", "squashfs", "rootfs"}
"""In memory, or a container's: another node has none of it, whatever is mounted there."""
TEMPORARY = ("tmp", "var/tmp", "dev/shm")


def check(configs: Iterable[RunConfig]) -> tuple[list[str], list[str]]:
    """Return what other nodes cannot see, and what they perhaps cannot, each as "key: path and why"."""
    problems: list[str] = []
    warnings: list[str] = []
    for config in configs:
        for key, path in _places(config):
            kind = kind_of(path)
            temporary = any(path.absolute().is_relative_to(Path("/", name)) for name in TEMPORARY)
            if kind in OF_ONE_MACHINE or (temporary and not SHARED.fullmatch(kind)):
                problems.append(f"{key}: {path} is on this machine alone ({kind}): other nodes do not see it")
            elif kind and not SHARED.fullmatch(kind):
                warnings.append(f"{key}: {path} is on {kind}, often a disk of one machine: is it shared by all nodes?")
    return list(dict.fromkeys(problems)), list(dict.fromkeys(warnings))


def kind_of(path: Path) -> str:
    """Return the type of the file system that holds a path, or would hold it; "" if the system does not say."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    found, length = "", -1
    for where, kind in _mounts():
        if there.resolve().is_relative_to(where) and len(where.parts) >= length:  # the later of two covers the other
            found, length = kind, len(where.parts)
    return found


def _mounts() -> Iterator[tuple[Path, str]]:
    lines: Sequence[str] = MOUNTS.read_text(encoding="utf-8").splitlines() if MOUNTS.exists() else ()
    for line in lines:
        _, where, kind, *_ = line.split()
        yield Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), where)), kind


def _places(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Yield the key and the path of everything local that the processes read or write."""
    yield "output", Path(config.output)
    if config.data.cache:
        yield "data.cache", Path(config.data.cache).expanduser()
    for role in ("train", "validation", "test"):
        for source in getattr(config.data, role) or ():
            if not re.match(r"\w+:", source.path):  # a sample, or data of a package
                yield from ((f"data.{role}", file) for file in check_there(source, role)[1] if file.exists())
    for key, value in (("model.path", config.model.path), ("model.tokenizer", config.model.tokenizer)):
        if isinstance(value, str) and os.path.exists(value):
            yield key, Path(value)
