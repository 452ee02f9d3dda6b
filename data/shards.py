"""The shards of a stream: where they lie, and their rows from any row on. Nothing of them is kept on this machine."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from data import shard_files
from data.errors import Unavailable, UserError, away
from data.text_files import READERS

log = logging.getLogger("data")

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}
URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")

WAITS = (1, 2, 5, 15, 30)  # seconds before a shard is opened again that the network has broken off

Row = dict[str, Any]
Placed = tuple[str, "Row | str"]
"""(place, row), or (place, what is wrong with it)."""


class Shard(Protocol):
    """A part of a source that is read from its beginning to its end, or from a row in between."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    @property
    def identity(self) -> str:
        """What is known of its contents without reading them: they changed if this did."""

    @property
    def loose(self) -> bool:
        """Whether its rows come without types, as those of text files do."""

    def features(self) -> Any:
        """The types that it declares, as `datasets` has them; None where there are none."""

    def rows(self, start: int, columns: Sequence[str] | None) -> Iterator[Placed]:
        """Yield the rows from number `start` on, with at least these columns (all of them, if None).

        Raises `UserError` for a shard that cannot be read, after some patience with the network.
        """


@dataclass(frozen=True)
class FileShard:
    """A file on this machine, or at any address that fsspec knows."""

    address: str
    role: str
    size: int | None
    tag: str = ""
    """What its store says of its version (ETag), if anything."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What fsspec is told, such as a token."""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.address.rstrip("/").rpartition("/")[2]

    @property
    def identity(self) -> str:
        """Name, size and tag: the folder may change."""
        return repr((self.name, self.size, self.tag))

    @property
    def suffix(self) -> str:
        """The ending that says how it is read."""
        return suffix_of(self.name)

    @property
    def loose(self) -> bool:
        """Text files have no types."""
        return self.suffix in READERS

    def features(self) -> Any:
        """Those of a binary file."""
        if self.loose:
            return None
        try:
            with self.binary() as stream:
                return shard_files.features(stream, parquet=self.suffix == ".parquet")
        except UserError:
            raise
        except Exception as error:  # several libraries, several kinds
            raise UserError(
                f"data.{self.role}: {self.address} is not a readable {self.suffix[1:]} file: {error}"
            ) from error

    def rows(self, start: int, columns: Sequence[str] | None) -> Iterator[Placed]:
        """Yield the rows from number `start` on. A parquet file begins at the row group, others are read over."""
        remote = bool(URL.match(self.address))
        yield from _patiently(lambda row: self._rows(row, columns), start, self.role, self.address, remote=remote)

    def _rows(self, start: int, columns: Sequence[str] | None) -> Iterator[Placed]:
        if self.loose:
            yield from shard_files.text_rows(READERS[self.suffix], self, start)
            return
        with self.binary() as stream:
            reader = shard_files.parquet_rows if self.suffix == ".parquet" else shard_files.arrow_rows
            yield from reader(stream, start, columns, f"data.{self.role}: {self.address}")

    def binary(self) -> IO[bytes]:
        """Open it, unpacked; raises `UserError` if its length or tag is not what it was when the run began."""
        import fsspec

        there: Any = fsspec.open(self.address, "rb", **self.options)
        if self.tag:
            there.fs.invalidate_cache(there.path)  # of what a folder was listed to hold
            if tag_of(there.fs.info(there.path)) != self.tag:
                raise UserError(
                    f"data.{self.role}: {self.address} was replaced: its store names another version (ETag) than when "
                    "the run began. Bring it back, or begin again in another output folder"
                )
        # of a parquet file only certain pages are wanted: what a store's files read ahead would be fetched in vain
        exact = {"cache_type": "none"} if self.suffix == ".parquet" else {}
        plain: Any = there.fs.open(there.path, "rb", **exact)
        size = getattr(plain, "size", None)
        if None not in (size, self.size) and size != self.size:
            plain.close()
            raise UserError(
                f"data.{self.role}: {self.address} has {size:,} bytes now, and had {self.size:,}: it is being written, "
                "or was replaced. Bring it back, or begin again in another output folder"
            )
        kind = COMPRESSED.get(Path(self.name).suffix.lower())
        return fsspec.compression.compr[kind](plain, mode="rb") if kind else plain  # type: ignore[no-any-return]

    def open(self, *, encoding: str, newline: str | None = None) -> io.TextIOWrapper:
        """Open it as text: what `text_files` asks of a path."""
        return io.TextIOWrapper(self.binary(), encoding=encoding, newline=newline)

    def read_text(self, encoding: str) -> str:
        """Return all of it: what `text_files` asks of a path whose kind cannot be read in parts."""
        with self.open(encoding=encoding) as stream:
            return stream.read()

    def __str__(self) -> str:
        """Its address, for messages."""
        return self.address


@dataclass(frozen=True)
class HubShard:
    """A shard of a data set of the Hub, as `datasets` streams it; also of a folder that looks like one."""

    dataset: Any
    path: str
    role: str
    number: int
    loose = False

    @property
    def name(self) -> str:
        """The data set's name and the shard's number."""
        return f"{self.path}, shard {self.number}"

    @property
    def identity(self) -> str:
        """Name, number and columns: `data.train.revision` is what holds a data set of the Hub still."""
        return repr((self.path, self.number, self.dataset.num_shards, sorted(self.dataset.features or ())))

    def features(self) -> Any:
        """Those of the data set, as far as it knows them without reading."""
        return self.dataset.features

    def rows(self, start: int, columns: Sequence[str] | None) -> Iterator[Placed]:
        """Yield the rows from number `start` on; those before are read over."""
        where = f"data.{self.role}: {self.path}"
        part = self.dataset.shard(num_shards=self.dataset.num_shards, index=self.number)
        remote = not Path(self.path).expanduser().is_dir()
        yield from _patiently(
            lambda row: shard_files.hub_rows(part, row, columns, where), start, self.role, self.name, remote=remote
        )


def _patiently(
    read: Callable[[int], Iterator[Placed]], start: int, role: str, address: str, *, remote: bool
) -> Iterator[Placed]:
    """Yield what `read` gives from row `start` on; where the network breaks off, from that row on after a while.

    Raises `UserError` for what cannot be read; `Unavailable` where that was the network, after all tries.
    """
    tries = 0
    while True:
        try:
            for placed in read(start):
                yield placed
                start, tries = start + 1, 0
            return
        except UserError:
            raise
        except Exception as error:  # several libraries, several kinds
            if isinstance(error, FileNotFoundError) and not away(error):
                raise UserError(f"data.{role}: there is no shard {address!r} (any more)") from error
            reason = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}".splitlines()[0]
            again = remote and _is_network(error)
            if not again or tries == len(WAITS):
                kind = Unavailable if again else UserError
                raise kind(
                    f"data.{role}: {address}: cannot be read on from row {start} (from 0): {reason}. "
                    "Was it cut short, or is it being written? Bring it back; the same command goes on"
                ) from error
            log.warning("%s, row %d: %s; trying again in %d s", address, start, reason, WAITS[tries])
            time.sleep(WAITS[tries])
            tries += 1


def tag_of(info: Mapping[str, Any]) -> str:
    """Return what a store says of a file's version, or ""."""
    return str(info.get("ETag") or info.get("etag") or info.get("blob_id") or "")


def suffix_of(name: str) -> str:
    """Return the ending that says how a file is read: that inside of `.gz`."""
    path = Path(name)
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def fingerprint(shards: Sequence[Sequence[Shard]], *settings: Any) -> str:
    """Return what positions in a stream depend on: its shards, and the settings by which they are read."""
    known = [[shard.identity for shard in source] for source in shards]
    return hashlib.sha256(repr((known, settings)).encode()).hexdigest()[:16]


def _is_network(error: BaseException) -> bool:
    """Whether trying again may help. Told by kind, as far as the libraries that a store needs are installed."""
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | TimeoutError | EOFError) or bool(
        kinds & {"aiohttp", "asyncio", "requests", "httpx", "botocore", "urllib3", "fsspec"}
    )
