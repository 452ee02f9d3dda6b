"""The shards of a source that is streamed: files here, at any address that fsspec knows, or of the Hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data import package, samples
from data.errors import Unavailable, UserError, away, blame
from data.shards import COMPRESSED, URL, FileShard, HubShard, Shard, suffix_of, tag_of
from data.source import BINARY, Source
from data.text_files import READERS

KNOWN = (*READERS, *BINARY)
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find(source: Source, role: str, token: str | None) -> list[Shard]:
    """Return the shards of a source, in the order of their names; lists names, but reads no rows.

    Raises `UserError` for what is not there, or cannot be streamed.
    """
    where = f"data.{role}: {source.path}"
    if source.path.startswith(samples.SCHEME):
        raise UserError(f"{where} comes with the program and is small; leave data.streaming out")
    if URL.match(source.path):
        _unused(source, role)
        return [*_remote(source.path, role, token, where)]
    path = Path(package.resolve(source.path)).expanduser()
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        raise UserError(f"{where} is a saved data set, which is never loaded whole: leave data.streaming out")
    files = [Path(found) for each in spread(str(path)) for found in _matches(each)]
    if not files and (suffix_of(path.name) in KNOWN or glob.has_magic(str(path)) or RANGE.search(str(path))):
        raise UserError(f"data.{role}: there is no file {source.path!r} (looked from {Path.cwd()})")
    if path.is_dir() or not files:
        return [*_hub(source, role, token)]
    _unused(source, role)
    _check_known([file.name for file in files], where)
    return [FileShard(str(file), role, file.stat().st_size) for file in files]


def spread(address: str) -> list[str]:
    """Return "x-00.csv", "x-01.csv", ... for "x-{00..11}.csv": how shards are named where nobody lists a folder."""
    found = RANGE.search(address)
    if found is None:
        return [address]
    low, high = int(found[1]), int(found[2])
    numbers = [str(number).zfill(len(found[1])) for number in range(low, high + 1)]
    return [one for number in numbers for one in spread(address[: found.start()] + number + address[found.end() :])]


def _unused(source: Source, role: str) -> None:
    for key in ("name", "split", "revision"):
        if getattr(source, key) is not None:
            raise UserError(f"data.{role}: {key} cannot take effect on {source.path!r}; leave it out")


def _matches(pattern: str) -> list[str]:
    found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
    return [file for file in found if Path(file).is_file()]


def _check_known(names: Sequence[str], where: str) -> None:
    for name in names:
        if suffix_of(name) not in KNOWN:
            raise UserError(
                f"{where}: cannot read {name!r}: known endings are {', '.join(KNOWN)}, and of text files with "
                f"{', '.join(COMPRESSED)} behind it"
            )
        if suffix_of(name) in BINARY and Path(name).suffix.lower() in COMPRESSED:
            raise UserError(f"{where}: {name} is packed as a whole, and cannot be read in parts; unpack it")


def _remote(address: str, role: str, token: str | None, where: str) -> Iterator[FileShard]:
    import fsspec

    options = {"token": token} if token and address.startswith("hf://") else {}
    try:
        system, _ = fsspec.core.url_to_fs(address, **options)
        scheme = address.partition("://")[0]
        listed: dict[str, dict[str, Any]] = {}
        for one in spread(address):
            _, path = fsspec.core.url_to_fs(one, **options)
            if glob.has_magic(path) and not scheme.startswith("http"):
                listed.update(system.glob(path, detail=True))
            else:
                listed[path] = system.info(path)
    except FileNotFoundError as error:  # fsspec says so of a server that is away too
        if not away(error):
            raise UserError(f"{where}: there is no {str(error) or address}") from error
        raise _not_reached(where, error.__cause__ or error) from error
    except ImportError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # network, permission and name errors of several libraries
        raise _not_reached(where, error) from error
    found = {name: info for name, info in sorted(listed.items()) if info.get("type", "file") == "file"}
    if not found:
        raise UserError(f"{where}: no file matches")
    _check_known([name.rpartition("/")[2] for name in found], where)
    for name, info in found.items():
        yield FileShard(system.unstrip_protocol(name), role, info.get("size"), tag_of(info), options)


def _not_reached(where: str, error: BaseException) -> Unavailable:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return Unavailable(f"{where} cannot be reached: {reason}. Check address, permission and network")


def _hub(source: Source, role: str, token: str | None) -> Iterator[HubShard]:
    from datasets import load_dataset

    split = source.split or role
    try:
        dataset = load_dataset(
            source.path, source.name, revision=source.revision, token=token, split=split, streaming=True
        )
    except Exception as error:  # network, permission and name errors of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise blame(error)(
            f"data.{role}: {source.path!r} is no local file (looked from {Path.cwd()}), and streaming its split "
            f"{split!r} from the Hub failed: {reason}. Give a path or an address, or check name and network"
        ) from error
    for number in range(dataset.num_shards):
        yield HubShard(dataset, source.path, role, number)
