"""A source that is streamed: its rows in blocks, each encoded and shuffled, on a few readers that share its shards.

What a reader gives is a pure function of (seed, its number, pass): who reads, how many processes there are and where
they stopped before play no part. Its place is a few integers, and going on reads one block again.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from data import pulse, text_files
from data.encode import CHUNK, Work, encode_chunk
from data.errors import UserError
from data.order import derive, permute
from data.shards import Placed, Shard
from data.tables import table_of

if TYPE_CHECKING:
    import pyarrow as pa

Place = tuple[int, int, int]
"""(pass, place in the reader's shards of the pass, row)."""


@dataclass(frozen=True)
class Kinds:
    """What the first rows of text files tell of the types of all: files that have none of their own."""

    kinds: dict[str, str]
    """Kind by column, for `text_files.misfit`."""
    schema: Any
    """An Arrow schema."""


@dataclass(frozen=True)
class Block:
    """Some consecutive rows of a reader as examples, in the order in which they are given."""

    begins: Place
    next: Place
    """Where the block after it begins."""
    examples: pa.Table | None
    """What the task's `encode` gives, and `shard` and `row`; None where no row is usable."""
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        """Its examples."""
        return 0 if self.examples is None else len(self.examples)

    @property
    def last(self) -> bool:
        """Whether it is the last of its pass."""
        return self.next[0] > self.begins[0]


@dataclass(frozen=True)
class Stream:
    """The rows of one source, as examples. `readers` is no more than there are shards."""

    number: int
    """Of the source."""
    shards: Sequence[Shard]
    readers: int
    block: int
    """Rows read, encoded and shuffled at once."""
    seed: int
    work: Work
    kinds: Kinds | None
    _own: threading.local = field(default_factory=threading.local, repr=False, compare=False)
    _copying: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def share(self, reader: int, passed: int) -> list[int]:
        """Return the numbers of the shards that a reader takes in a pass: every shard is one reader's."""
        order = permute(np.arange(len(self.shards)), len(self.shards), derive(self.seed, "shards", self.number, passed))
        return [int(shard) for shard in order[reader :: self.readers]]

    def taken(self, reader: int, begins: Place) -> Iterator[tuple[int, int, Placed]]:
        """Yield (shard, row, what stands there) from a place on, to the end of the pass."""
        passed, first, row = begins
        for place, shard in enumerate(self.share(reader, passed)[first:], first):
            start = row if place == first else 0
            rows = self.shards[shard].rows(start, self.work.encoder.columns)
            for number, placed in enumerate(rows, start):
                yield place, number, placed

    def encode(self, reader: int, begins: Place, rows: Sequence[tuple[int, int, Placed]]) -> Block:
        """Return rows as a block. May be called by several threads: each has the tokenizer to itself."""
        import pyarrow as pa

        skipped: list[str] = []
        shards = self.share(reader, begins[0])
        names = [f"{self.shards[shards[place]].name}, {where}" for place, _, (where, _) in rows]
        good = self._good(rows, names, skipped)
        columns = self._columns([row for _, row in good], names[0] if names else "")
        tables = []
        for first in range(0, len(good), CHUNK):
            places = [place for place, _ in good[first : first + CHUNK]]
            chunk = {name: values[first : first + CHUNK] for name, values in columns.items()}
            called = [names[place] for place in places]
            features = encode_chunk(chunk, self._work(), called.__getitem__, skipped)
            if features is None:
                continue
            origins = [rows[places[at]] for at in features.pop("row")]
            features = {name: values for name, values in features.items() if name not in ("rows", "longest")}
            where = {"shard": [shards[place] for place, _, _ in origins], "row": [row for _, row, _ in origins]}
            tables.append(table_of({**where, **features}))
        over = len(rows) < self.block
        following = (begins[0] + 1, 0, 0) if over else (begins[0], rows[-1][0], rows[-1][1] + 1)
        if not tables:
            return Block(begins, following, None, tuple(skipped))
        whole = pa.concat_tables(tables, promote_options="permissive")
        key = derive(self.seed, "block", self.number, reader, *begins)
        shuffled = whole.take(permute(np.arange(len(whole)), len(whole), key)).combine_chunks()
        return Block(begins, following, shuffled, tuple(skipped))

    def _good(
        self, rows: Sequence[tuple[int, int, Placed]], names: Sequence[str], skipped: list[str]
    ) -> list[tuple[int, dict[str, Any]]]:
        """Return the rows that could be read, with their places; note the others, or raise `UserError`."""
        kinds = dict(self.kinds.kinds) if self.kinds else None
        good = []
        for place, (_, _, (_, row)) in enumerate(rows):
            problem = row if isinstance(row, str) else misfit(row, kinds)
            if problem is None:
                assert isinstance(row, dict)
                good.append((place, row))
            elif self.work.skip_bad:
                skipped.append(f"{names[place]}: {problem}")
            else:
                raise UserError(f"{names[place]}: {problem}. Mend it, or set data.on_bad_row=skip")
        return good

    def _columns(self, rows: list[dict[str, Any]], name: str) -> dict[str, list[Any]]:
        wanted = [{name: row.get(name) for name in self.work.encoder.columns} for row in rows]
        if self.kinds is not None:
            return typed(wanted, self.kinds.schema, name).to_pydict()  # type: ignore[no-any-return]
        return {name: [row[name] for row in wanted] for name in self.work.encoder.columns}

    def _work(self) -> Work:
        """Return the task and its tokenizer for this thread alone: a fast tokenizer may be borrowed only once."""
        if not hasattr(self._own, "work"):
            with self._copying:
                self._own.work = copy.deepcopy(self.work)
        work: Work = self._own.work
        return work


class Reader:
    """One reader of a stream on this process: gives its examples in order, and prepares a block ahead."""

    def __init__(self, stream: Stream, number: int, pool: ThreadPoolExecutor, state: Sequence[int]) -> None:
        """`state` is a place, how many examples of the block there are given, and how many of the pass."""
        self.stream, self.number, self.pool = stream, number, pool
        passed, shard, row, self.given, self.count = state
        self._begins = (passed, shard, row)
        self._rows: Iterator[tuple[int, int, Placed]] = iter(())
        self._at: Place | None = None
        self._block: Block | None = None
        self._next: Future[Block] = pool.submit(self._read, self._begins)

    def ready(self) -> None:
        """Wait until the block that it begins with is read, or what is wrong with it is known."""
        wait([self._next])
        pulse.beat()

    def state(self) -> list[int]:
        """Return where it stands."""
        return [*self._begins, self.given, self.count]

    def take(self, most: int, skipped: list[str]) -> tuple[list[pa.Table], int]:
        """Return the next examples of the pass, at most so many, as slices, and the number of the first.

        Fewer: the pass is over. Unusable rows are added to `skipped` with the first example behind them.
        """
        found: list[pa.Table] = []
        first, missing = self.count, most
        while missing:
            block = self._current()
            if self.given == 0:
                skipped += block.skipped
            some = min(missing, len(block) - self.given)
            if some:
                assert block.examples is not None
                found.append(block.examples.slice(self.given, some))
                self.given, missing = self.given + some, missing - some
            if missing and block.last:
                break
            if missing:
                self._advance()
        self.count += most - missing
        return found, first

    def begin(self) -> None:
        """Go on to the next pass."""
        self._advance()
        self.count = 0

    def _current(self) -> Block:
        if self._block is None:
            self._block = self._next.result()
            self._next = self.pool.submit(self._read, self._block.next)
        return self._block

    def _advance(self) -> None:
        self._begins = self._current().next
        self._block, self.given = None, 0

    def _read(self, begins: Place) -> Block:
        if self._at != begins:  # else the shard is open still, at the right row
            self._rows = self.stream.taken(self.number, begins)
        rows = list(islice(self._rows, self.stream.block))
        block = self.stream.encode(self.number, begins, rows)
        self._at = block.next if not block.last else None
        return block


def misfit(row: dict[str, Any], kinds: dict[str, str] | None) -> str | None:
    """Say which value of a row of a text file is of another kind than those before it, as `text_files` does."""
    if kinds is None:
        return None
    return next((text for text in (text_files.misfit(*cell, kinds) for cell in row.items()) if text), None)


def typed(rows: list[dict[str, Any]], schema: Any, name: str) -> Any:
    """Return rows as an Arrow table, of the types of `schema` as far as it goes; `name` says where they begin."""
    import pyarrow as pa

    try:
        natural = text_files.table_of(rows).schema
        whole = pa.unify_schemas([schema, natural] if schema is not None else [natural], promote_options="permissive")
        return text_files.table_of(rows, whole)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{name} and the rows after it: rows disagree about a column's type: {error}") from error
