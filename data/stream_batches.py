"""Streams → batches: the same interface as `Batches`, and the same promise: an update's examples know no process count.

Update by update, every reader of a source gives equally many examples (or one more, by turns) until its shards of the
pass are read; the pass is over when all of them are. Each process reads for its own readers and tells the others what
they gave, so that all know the whole batch, cut it as memory-mapped data is cut, and know every reader's place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.batches import Batch, Batches, Places, Position
from data.errors import Unavailable, UserError
from data.order import example_keys
from data.stream import Reader, Stream
from data.tables import arrays

if TYPE_CHECKING:
    import pyarrow as pa

Gather = Callable[[bytes], list[bytes]]
"""What this process says → what every process says, in order; all call it equally often."""

THREADS = 4  # that read and encode for the readers of a process


def alone(said: bytes) -> list[bytes]:
    """Gather what the only process says."""
    return [said]


def nobody() -> None:
    """Meet where there is nobody else."""


@dataclass
class _Source:
    """How far a source is: the same on all processes."""

    passed: int
    turn: int
    """The reader that is the next to give one more than the others."""
    taken: int
    """Examples of the whole run."""
    dry: set[int]
    """Readers that have no more in this pass."""
    readers: list[list[int]]
    """`Reader.state` of each."""
    empty: bool
    """Whether nobody has given anything in this pass."""

    def quotas(self, missing: int) -> dict[int, int]:
        """Return how many of `missing` examples each reader is to give, and remember whose turn it is."""
        alive = [reader for reader in range(len(self.readers)) if reader not in self.dry]
        alive = [*(one for one in alive if one >= self.turn), *(one for one in alive if one < self.turn)]
        each, more = divmod(missing, len(alive))
        self.turn = alive[more % len(alive)]
        return {reader: each + (place < more) for place, reader in enumerate(alive) if each or place < more}


@dataclass(frozen=True)
class StreamBatches:
    """The batches of streamed sources, for one process; `like` makes batches of the first examples, for estimates."""

    streams: Sequence[Stream]
    weights: Sequence[float]
    batch_size: int
    seed: int
    like: Batches
    gather: Gather = alone
    meet: Callable[[], None] = nobody
    """Waits until all processes have read what they begin with: far into a shard that may take long."""
    updates_per_epoch: int = 0

    @property
    def cuts(self) -> Batches:
        """The batches of the first examples: a stream's are cut like them."""
        return self.like

    @property
    def fingerprint(self) -> str:
        """Of shards and settings."""
        return self.like.fingerprint

    def __str__(self) -> str:
        """Say how much there is, and who reads it."""
        shards = [len(stream.shards) for stream in self.streams]
        readers = [stream.readers for stream in self.streams]
        return f"streamed from {' + '.join(map(str, shards))} shards by {' + '.join(map(str, readers))} readers"

    def examples_until(self, update: int) -> int:
        """Return how many examples the first `update` updates take."""
        return update * self.batch_size

    def padding_efficiency(self) -> float:
        """Return real over computed tokens among the first examples."""
        return self.like.padding_efficiency()

    def between(self, done: int, updates: int, position: Position = None) -> Iterator[tuple[int, Batch]]:
        """Yield (number, batch) for the updates after number `done`, whose batch told `position`, up to `updates`.

        Raises `UserError` on all processes if one of them comes upon something unusable.
        """
        if done >= updates:
            return
        if done and position is None:
            raise UserError("the checkpoint does not say where the stream stood: it is of a run without data.streaming")
        sources = [_Source(**{**each, "dry": {*each["dry"]}}) for each in position["sources"]] if position else [
            _Source(0, 0, 0, set(), [[0] * 5 for _ in range(stream.readers)], True) for stream in self.streams
        ]  # fmt: skip
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="stream")
        try:
            mine = self._readers(sources, pool)
            for reader in mine.values():
                reader.ready()
            self.meet()
            for update in range(done + 1, updates + 1):
                yield update, self._batch(update, sources, mine)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _readers(self, sources: Sequence[_Source], pool: ThreadPoolExecutor) -> dict[tuple[int, int], Reader]:
        """Return this process's readers: dealt out over all sources, so that a source of few is not one process's."""
        names = [(source, reader) for source, stream in enumerate(self.streams) for reader in range(stream.readers)]
        return {
            (source, reader): Reader(self.streams[source], reader, pool, sources[source].readers[reader])
            for source, reader in names[self.like.process :: self.like.world]
        }

    def _batch(self, update: int, sources: list[_Source], mine: dict[tuple[int, int], Reader]) -> Batch:
        import pyarrow as pa

        missing = self._deal(sources)
        tables: list[pa.Table] = []
        skipped: list[str] = []
        rounds = 0
        while any(missing):
            quotas = [one.quotas(most) if most else {} for one, most in zip(sources, missing, strict=True)]
            said = [_unpack(each) for each in self.gather(self._give(quotas, mine))]
            if problem := next((head["problem"] for head, _ in said if head["problem"]), None):
                raise (Unavailable if problem[0] else UserError)(problem[1])
            gave: dict[tuple[int, int], list[int]] = {}
            for head, table in said:
                gave.update({(source, reader): told for source, reader, *told in head["gave"]})
                skipped += head["skipped"]
                if len(table):
                    place = table.schema.get_field_index("__order__")
                    order = table.column(place).to_numpy() + (rounds << 40)  # what is given later comes later
                    tables.append(table.set_column(place, "__order__", [order]))
            rounds += 1
            for number, source in enumerate(sources):
                missing[number] -= self._note(number, source, quotas[number], gave, mine)
        whole = pa.concat_tables(tables, promote_options="permissive")
        features = arrays(whole)
        order = np.argsort(features.pop("__order__"), kind="stable")
        return self._cut(update, whole.drop_columns(["__order__"]).take(order), sources, tuple(skipped))

    def _deal(self, sources: Sequence[_Source]) -> list[int]:
        """Return how many examples of the next batch each source gives: as near to its weight as whole numbers are."""
        missing = [0] * len(sources)
        for _ in range(self.batch_size):
            behind = [(source.taken + 0.5) / weight for source, weight in zip(sources, self.weights, strict=True)]
            number = behind.index(min(behind))
            sources[number].taken += 1
            missing[number] += 1
        return missing

    def _give(self, quotas: Sequence[dict[int, int]], mine: dict[tuple[int, int], Reader]) -> bytes:
        """Take from this process's readers what they are to give; return it, or what is wrong, for all processes."""
        gave, skipped, tables, problem = [], list[str](), list["pa.Table"](), None
        try:
            for (source, number), reader in mine.items():
                most = quotas[source].get(number, 0)
                if not most:
                    continue
                found, first = reader.take(most, skipped)
                gave.append([source, number, reader.count - first, *reader.state()])
                tables += self._marked(found, source, number, reader.state()[0], first)
        except UserError as error:
            problem = isinstance(error, Unavailable), str(error)
        return _pack({"gave": gave, "skipped": skipped, "problem": problem}, tables)

    def _marked(
        self, found: Sequence[pa.Table], source: int, reader: int, passed: int, first: int
    ) -> Iterator[pa.Table]:
        """Yield examples with their ids, unique in the run, source, and place in the batch: by number, then reader."""
        all_readers = sum(stream.readers for stream in self.streams)
        before = sum(stream.readers for stream in self.streams[:source])
        for place, table in enumerate(found):
            start = first + sum(len(other) for other in found[:place])
            numbers = np.arange(start, start + len(table), dtype=np.int64)
            ids = ((passed * all_readers + before + reader) << 40) + numbers
            column = np.full(len(table), source, dtype=np.int64)
            order = (numbers - first) * all_readers + before + reader
            yield (
                table.append_column("__id__", [ids])
                .append_column("__source__", [column])
                .append_column("__order__", [order])
            )

    def _note(
        self,
        number: int,
        source: _Source,
        quotas: dict[int, int],
        gave: dict[tuple[int, int], list[int]],
        mine: dict[tuple[int, int], Reader],
    ) -> int:
        """Bring a source's state up to date with what its readers gave; return how much that is."""
        got = 0
        for reader, most in quotas.items():
            some, *source.readers[reader] = gave[number, reader]
            got += some
            if some < most:
                source.dry.add(reader)
        source.empty &= not got
        if len(source.dry) == len(source.readers):
            if source.empty:
                raise UserError(f"data.train.{number}: no row of a whole pass is usable")
            source.passed, source.turn, source.dry, source.empty = source.passed + 1, 0, set(), True
            for (owner, _), one in mine.items():
                if owner == number:
                    one.begin()
            source.readers = [[source.passed, 0, 0, 0, 0] for _ in source.readers]
        return got

    def _cut(self, update: int, whole: pa.Table, sources: Sequence[_Source], skipped: tuple[str, ...]) -> Batch:
        features = arrays(whole)
        ids = features.pop("__id__")
        found = {name: features[name] for name in ("shard", "row")} | {"source": features.pop("__source__")}
        features["key"] = example_keys(ids, self.seed, "stream")
        batch = self.like.cut(update, ids, features, partial(self._places, found))
        position = {"sources": [{**vars(source), "dry": sorted(source.dry)} for source in sources]}
        return replace(batch, position=json.loads(json.dumps(position)), skipped=skipped)

    def _places(self, found: dict[str, NDArray[np.int64]]) -> Places:
        pairs = zip(found["source"].tolist(), found["shard"].tolist(), strict=True)
        shards = [self.streams[source].shards[shard].name for source, shard in pairs]
        several = {"sources": found["source"].tolist()} if len(self.streams) > 1 else {}
        return {**several, "shards": shards, "rows": found["row"].tolist()}


def _pack(head: dict[str, Any], tables: Sequence[pa.Table]) -> bytes:
    """Return plain values and the tables as one, as bytes: the length of the JSON, the JSON, an Arrow stream."""
    import pyarrow as pa

    whole = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    text = json.dumps(head).encode()
    return b"".join((len(text).to_bytes(8, "little"), text, sink.getvalue()))


def _unpack(said: bytes) -> tuple[dict[str, Any], pa.Table]:
    import pyarrow as pa

    end = 8 + int.from_bytes(said[:8], "little")
    with pa.ipc.open_stream(pa.py_buffer(said[end:])) as reader:
        return json.loads(said[8:end]), reader.read_all()
