"""Columns of a memory-mapped table: rows from anywhere, looked at where they lie."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data import advice

if TYPE_CHECKING:
    import pyarrow as pa

_OFFSET = np.dtype(np.int32)  # where a list begins


class MappedColumns:
    """The columns of a table in a memory-mapped file, for rows from anywhere: looks at those alone, and copies no list.

    Of each chunk that was come upon it keeps where its columns lie, two numbers each. So a column of any rows is found
    by a few calls of numpy, however many chunks they are from.
    """

    def __init__(self, table: pa.Table, *, alone: bool = False) -> None:
        """alone: whether the system is to read what is looked at and nothing around it (see `advice.alone`)."""
        self.table, self.alone = table, alone
        sizes = [[len(chunk) for chunk in column.chunks] for column in table.columns]
        self._ends: NDArray[np.int64] = np.cumsum(sizes[0])
        self._begins = self._ends - np.array(sizes[0])
        self._seen = np.zeros(len(sizes[0]), dtype=bool)
        self._addresses = np.zeros((len(sizes), 2, len(sizes[0])), dtype=np.int64)  # of numbers, of where lists begin
        self._kinds = [(column.name, column.type) for column in table.schema]
        self._memory = _Memory(table)
        self._looking = Lock()  # batches are made in one thread, what is told of them in another
        self.simple = all(map(_simple, table.schema.types)) and all(each == sizes[0] for each in sizes)
        """Whether all columns are numbers, or lists of numbers: others are not read by this."""

    def take(self, ids: NDArray[np.int64], only: Collection[str] | None = None) -> dict[str, Any] | None:
        """Return the columns of the rows `ids` (of these names), in that order, as `arrays` does.

        None where something is missing in a chunk that they lie in: then this is no way to read this table.
        """
        chunks, places = self._find(ids)
        if not self.simple:
            return None
        memory, found = self._memory, dict[str, Any]()
        for (name, kind), (numbers, offsets) in zip(self._kinds, self._addresses, strict=True):
            if only is not None and name not in only:
                continue
            if hasattr(kind, "value_type"):
                begins, ends = self._ends_of_lists(chunks, places, offsets)
                found[name] = memory.slices(_dtype(kind.value_type), numbers[chunks], begins, ends)
            else:
                dtype = _dtype(kind)
                found[name] = memory.read(dtype, numbers[chunks] + places * dtype.itemsize)
        return found

    def ask(self, ids: NDArray[np.int64], *, lists: bool) -> None:
        """Let the system read what these rows take from the disk, while something else is done.

        lists: what is in their lists, of which it must be known where they lie; or else that, and their numbers.
        """
        chunks, places = self._find(ids)
        if not self.simple:
            return
        first, size = list[NDArray[np.int64]](), list[NDArray[Any]]()
        for (_, kind), (numbers, offsets) in zip(self._kinds, self._addresses, strict=True):
            listed = hasattr(kind, "value_type")
            if lists and listed:
                width = _dtype(kind.value_type).itemsize
                begins, ends = self._ends_of_lists(chunks, places, offsets)
                first.append(numbers[chunks] + begins.astype(np.int64) * width)
                size.append((ends - begins) * width)
            elif not lists:
                width = _OFFSET.itemsize if listed else _dtype(kind).itemsize
                first.append((offsets if listed else numbers)[chunks] + places * width)
                size.append(np.full(len(ids), 2 * width if listed else width))
        if first:
            starts, sizes = np.concatenate(first), np.concatenate(size)
            there = sizes > 0  # empty lists are nowhere
            advice.soon(starts[there], (starts + sizes)[there])

    def _find(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the chunk of each row, and its place there; all that is to be known of these chunks is known then."""
        chunks = self._ends.searchsorted(ids, side="right")
        if not self._seen[chunks].all():
            with self._looking:
                for chunk in np.unique(chunks[~self._seen[chunks]]).tolist():
                    self._look(chunk)
        return chunks, ids - self._begins[chunks]

    def _ends_of_lists(
        self, chunks: NDArray[np.int64], places: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return where the lists of a column begin and end among the numbers of their chunks."""
        begins, memory = offsets[chunks] + places * _OFFSET.itemsize, self._memory
        return memory.read(_OFFSET, begins), memory.read(_OFFSET, begins + _OFFSET.itemsize)

    def _look(self, chunk: int) -> None:
        """Find out where the columns of a chunk lie."""
        columns = [column.chunk(chunk) for column in self.table.columns]
        if any(each.null_count or (hasattr(each, "offsets") and each.values.null_count) for each in columns):
            self.simple = False
            return
        if self.alone:
            buffers = [buffer for each in columns for buffer in each.buffers() if buffer]  # empty ones are nowhere
            advice.alone(min(each.address for each in buffers), max(each.address + each.size for each in buffers))
        for addresses, column in zip(self._addresses, columns, strict=True):
            lists = hasattr(column, "offsets")
            for place, array in enumerate([column.values, column.offsets] if lists else [column]):
                numbers = array.to_numpy()
                addresses[place, chunk] = numbers.ctypes.data
                self._memory = self._memory.including(numbers)
        self._seen[chunk] = True


@dataclass(frozen=True)
class _Memory:
    """What lies between two addresses of this process, as one array: only what is asked for of it is ever touched."""

    owner: Any
    """What must live as long as anything that was found."""
    low: int = 0
    high: int = 0
    views: dict[Any, NDArray[Any]] = field(default_factory=dict)

    def including(self, array: NDArray[Any]) -> _Memory:
        """Return this, with all of an array in it."""
        low, high = array.ctypes.data // 8 * 8, array.ctypes.data + array.nbytes
        if self.high:
            low, high = min(low, self.low), max(high, self.high)
        return self if not len(array) or (low, high) == (self.low, self.high) else _Memory(self.owner, low, high)

    def read(self, kind: np.dtype[Any], addresses: NDArray[np.int64]) -> NDArray[Any]:
        """Return the numbers of type `kind` at these addresses, which Arrow makes multiples of its size."""
        found: NDArray[Any] = self._view(kind)[(addresses - self.low) // kind.itemsize]
        return found

    def slices(
        self, kind: np.dtype[Any], addresses: NDArray[np.int64], first: NDArray[Any], last: NDArray[Any]
    ) -> list[NDArray[Any]]:
        """Return the numbers [first, last) after each address, not copied."""
        view, starts = self._view(kind), (addresses - self.low) // kind.itemsize
        pairs = zip((starts + first).tolist(), (starts + last).tolist(), strict=True)
        return [view[start:end] for start, end in pairs]

    def _view(self, kind: np.dtype[Any]) -> NDArray[Any]:
        if kind not in self.views:
            import pyarrow as pa

            size = self.high - self.low
            whole = pa.foreign_buffer(self.low, size, base=self.owner)
            self.views[kind] = np.frombuffer(whole, dtype=kind, count=size // kind.itemsize)
        return self.views[kind]


def _dtype(kind: pa.DataType) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(kind.to_pandas_dtype())
    return found


def _simple(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_list(kind) else kind
    return bool(pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind))
