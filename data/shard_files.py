"""What stands in one shard: its rows from a row on, by the kind of file. Reads on as it is asked to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import IO, Any

from data import pulse
from data.errors import UserError, nearest
from data.source import ARROW_FILE, named

Row = dict[str, Any]
Placed = Iterator[tuple[str, "Row | str"]]

READ = 1_000  # rows taken out of a binary file at once
BUFFER = 1 << 20  # bytes of a column of a parquet file that are held, packed: all readers of a process hold as much


def text_rows(reader: Callable[[Any], Placed], file: Any, start: int) -> Placed:
    """Yield the rows of a text file from number `start` on. `reader` is that of its ending in `text_files`."""
    try:
        rows = reader(file)
        read_over(rows, start)
        yield from rows
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {error.object[error.start]:#04x}): save it as UTF-8"
        ) from error


def read_over(rows: Iterator[Any], count: int) -> None:
    """Let `count` rows pass, with a sign of life now and then: that may be most of a large shard."""
    for first in range(0, count, READ):
        pulse.beat()
        for _ in islice(rows, min(READ, count - first)):
            pass


def features(stream: IO[bytes], *, parquet: bool) -> Any:
    """Return the types that a parquet or Arrow file declares, as `datasets` has them."""
    import pyarrow.parquet as pq
    from datasets import Features

    return Features.from_arrow_schema(pq.ParquetFile(stream).schema_arrow if parquet else _arrow(stream)[0])


def parquet_rows(stream: IO[bytes], start: int, columns: Sequence[str] | None, where: str) -> Placed:
    """Yield the rows of a parquet file from number `start` on; row groups before it are not read.

    Holds `BUFFER` bytes of each column, however large row groups are. Left to itself pyarrow would read all row groups
    that it is asked for at once, the whole file.
    """
    import pyarrow.parquet as pq

    file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER)
    wanted = _chosen(file.schema_arrow, columns, where)
    first, groups = 0, list(range(file.num_row_groups))
    while groups and first + file.metadata.row_group(groups[0]).num_rows <= start:
        first += file.metadata.row_group(groups.pop(0)).num_rows
    batches = file.iter_batches(READ, row_groups=groups, columns=wanted) if groups else ()
    yield from _from(batches, first, start, file.schema_arrow)


def arrow_rows(stream: IO[bytes], start: int, columns: Sequence[str] | None, where: str) -> Placed:
    """Yield the rows of an Arrow file or Arrow stream from number `start` on; batches before it are not converted."""
    schema, batches = _arrow(stream)
    wanted = _chosen(schema, columns, where)
    yield from _from((batch.select(wanted) for batch in batches), 0, start, schema)


def _arrow(stream: IO[bytes]) -> tuple[Any, Iterator[Any]]:
    import pyarrow as pa

    begins = stream.read(len(ARROW_FILE))
    stream.seek(0)
    if begins != ARROW_FILE:
        reader = pa.ipc.open_stream(stream)
        return reader.schema, iter(reader)
    file = pa.ipc.open_file(stream)
    return file.schema, (file.get_batch(number) for number in range(file.num_record_batches))


def hub_rows(dataset: Any, start: int, columns: Sequence[str] | None, where: str) -> Placed:
    """Yield the rows of a streamed data set of `datasets` from number `start` on; those before are read over."""
    features = dataset.features
    if columns is not None and features is not None:
        _check(list(features), columns, where)
        dataset = dataset.select_columns([*columns])
    first = 0
    for chunk in dataset.iter(READ):
        size = len(next(iter(chunk.values()), ()))
        if first + size > start:
            chunk = named(chunk, features) if features else chunk
            for row, values in enumerate(zip(*chunk.values(), strict=True), first):
                if row >= start:
                    yield _place(row), dict(zip(chunk, values, strict=True))
        else:
            pulse.beat()
        first += size


def _from(batches: Any, first: int, start: int, schema: Any) -> Placed:
    from datasets import Features

    features = Features.from_arrow_schema(schema)
    for batch in batches:
        if first + batch.num_rows <= start:
            pulse.beat()
            first += batch.num_rows
            continue
        for place in range(0, batch.num_rows, READ):
            chunk = named(batch.slice(place, READ).to_pydict(), features)
            for values in zip(*chunk.values(), strict=True):
                if first >= start:
                    yield _place(first), dict(zip(chunk, values, strict=True))
                first += 1


def _chosen(schema: Any, columns: Sequence[str] | None, where: str) -> list[str]:
    if columns is None:
        return list(schema.names)
    _check(schema.names, columns, where)
    return [*columns]


def _check(there: Sequence[str], columns: Sequence[str], where: str) -> None:
    for name in columns:
        if name not in there:
            raise UserError(f"{where} has no column {name!r}; it has {', '.join(there)}{nearest(name, there)}")


def _place(row: int) -> str:
    return f"row {row} (from 0)"
