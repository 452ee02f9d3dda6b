"""The embedded data: files that ship (`package:data/samples/...`), and `samples:NAME`, built where it is used.

What is built is a module here with that name, `SPLITS`, `identity()` and `rows(split)`: there is nothing to register.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

from data.cache import Notes, kept
from data.errors import UserError, nearest
from data.text_files import LINE

SCHEME = "samples:"
CHUNK = 10_000  # rows written at once


class Builder(Protocol):
    """A module that makes rows out of what is on every machine."""

    SPLITS: tuple[str, ...]

    def identity(self) -> str:
        """Return everything that the rows depend on, but the module's own code."""

    def rows(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (place, row): the place names a row to people, the rows have the same keys throughout.

        Raises `UserError` where what they are made of is missing.
        """


def names() -> list[str]:
    """Return what can be built."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def build(address: str, split: str, where: str, cache: Path) -> Path:
    """Return the Arrow file of one split of `samples:NAME`, with each row's place in the column `LINE`.

    Built once for each state of what it is made of, whole or not at all; processes that call this together wait for
    the first. Raises `UserError` with the names or the splits there are.
    """
    name, there = address.removeprefix(SCHEME), names()
    if name not in there:
        raise UserError(f"{where}: there is no {address!r}; there is {SCHEME}{f', {SCHEME}'.join(there)}"
                        f"{nearest(name, there)}")  # fmt: skip
    module = importlib.import_module(f"{__name__}.{name}")
    builder = cast(Builder, module)
    if split not in builder.SPLITS:
        raise UserError(
            f"{where}: {address} has no split {split!r}; it has {', '.join(builder.SPLITS)}. Choose one with "
            f"{where}.split"
        )
    key = repr((inspect.getsource(module), builder.identity(), split))
    target = cache / "samples" / f"{name}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"
    kept(target, lambda writing: _write(builder.rows(split), writing))
    return target


def _write(placed: Iterator[tuple[str, dict[str, Any]]], target: Path) -> Notes:
    import pyarrow as pa

    rows = ({**row, LINE: place} for place, row in placed)
    first = pa.Table.from_pylist(list(islice(rows, CHUNK)))
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
        writer.write_table(first)
        while chunk := list(islice(rows, CHUNK)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=first.schema))
    return {}
