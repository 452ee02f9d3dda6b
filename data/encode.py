"""A task's `encode` over rows, once: cached by fingerprint, memory-mapped, with lengths and targets as columns."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data import pulse
from data.cache import Notes, kept
from data.encoded import REAL, Encoded
from data.errors import UserError
from data.source import Rows, named
from data.tables import grouped, table_of

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 1_000  # rows tokenized at once: enough for a fast tokenizer to use all cores
SHOWN = 5  # problems named in one message
VERSION = 2  # part of the cache key: raise it when what is written changes


class Encoder(Protocol):
    """What `data` needs of a task: pure functions of rows, so that the result can be kept."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns of the rows that it reads."""

    @property
    def identity(self) -> str:
        """Everything about the task that the encoded data depends on."""

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Say what makes a row unusable, or None."""

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Return the features of usable rows, among them `input_ids`, `length` (tokens) and `targets` (count).

        An example a row, or several, or one for several: then `row` says, for each example, the place in `rows` of the
        (first) row that it comes from; and `rows`, a list, those of all its parts. Where an example is several
        sequences, `length` is what they take when computed together, `longest` says how long the longest is, and
        `real_tokens` how many tokens they have. What only the tokens show to be unusable has no example: then
        `unusable` holds (place in `rows`, what is wrong with it).
        """


def encode_sources(
    sources: Sequence[Sequence[Rows]], encoder: Encoder, tokenizer: Any, max_length: int, *, skip_bad: bool, cache: Path
) -> Encoded:
    """Encode each source's files, or map what an earlier run with the same rows, task and tokenizer has encoded.

    With several processes one encodes and the others wait for a file lock, holding no collective.
    Raises `UserError` naming file and row for rows that cannot be used, unless `skip_bad`.
    """
    from datasets import Dataset, concatenate_datasets

    work, parts = Work(encoder, tokenizer, max_length, skip_bad), list[Dataset]()
    sizes, skipped, longest, digests = [], [], 0, []
    for files in sources:
        start = size = 0
        bad: list[str] = []
        for rows in files:
            path, notes = _encode_file(rows, work, cache, start)
            bad += [*rows.skipped, *notes["skipped"]]
            start, size = start + len(rows.dataset), size + notes["examples"]
            longest += notes["longest"]
            if notes["examples"]:  # a file without usable rows has no columns either
                parts.append(Dataset.from_file(str(path)))
                digests.append(notes["digest"])
        if not size:
            raise UserError(f"{files[0].name}: no usable rows; {len(bad):,} were skipped, the first: {bad[0]}")
        sizes.append(size)
        skipped += bad
    fingerprint = hashlib.sha256(repr((sizes, digests)).encode()).hexdigest()[:16]
    whole = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    return Encoded(whole, tuple(sizes), tuple(skipped), longest, fingerprint)


@dataclass(frozen=True)
class Work:
    """What is done to rows, whatever rows they are."""

    encoder: Encoder
    tokenizer: Any
    max_length: int
    skip_bad: bool

    @cached_property
    def key(self) -> str:
        """Everything that the result depends on, but the rows. The code is part of it: a changed task never meets a
        stale cache."""
        kind = type(self.encoder)
        module = sys.modules[kind.__module__]
        shared = sorted(Path(inspect.getfile(module)).parent.glob("_*.py"))  # what tasks share stands beside them
        code = (inspect.getsource(module), *(file.read_text(encoding="utf-8") for file in shared))
        parts = (code, kind.__qualname__, self.encoder.identity, _identity(self.tokenizer), self.max_length)
        return repr((VERSION, self.skip_bad, *parts))

    @property
    def settings(self) -> str:
        """What is in `key` but the code: a run may go on after that has changed."""
        kind = type(self.encoder).__qualname__
        return repr((self.skip_bad, kind, self.encoder.identity, _identity(self.tokenizer), self.max_length))


def _encode_file(rows: Rows, work: Work, cache: Path, start: int) -> tuple[Path, Notes]:
    key = repr((rows.dataset._fingerprint, start, work.key))
    target = cache / "encoded" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.arrow"
    return target, kept(target, lambda writing: _write(rows, work, writing, start))


def _write(rows: Rows, work: Work, target: Path, start: int) -> Notes:
    import pyarrow as pa

    notes: Notes = {"examples": 0, "skipped": [], "longest": 0}
    digest = hashlib.blake2b(digest_size=16)
    tables = (_digest(table, digest) for table in _encoded(rows, work, start, notes))
    with pa.OSFile(str(target), "wb") as sink, ExitStack() as stack:
        writer = None
        for table in grouped(tables):
            writer = writer or stack.enter_context(pa.ipc.new_stream(sink, table.schema))
            writer.write_table(table)
    return {**notes, "digest": digest.hexdigest()}


def _encoded(rows: Rows, work: Work, start: int, notes: Notes) -> Iterator[pa.Table]:
    """Yield a table for each chunk that holds usable rows; keep `notes` on the way."""
    dataset = rows.dataset.select_columns([*work.encoder.columns])
    for first in range(0, len(dataset), CHUNK):
        pulse.beat()
        chunk = named(dataset[first : first + CHUNK], dataset.features)
        features = encode_chunk(chunk, work, partial(_where, rows, first), notes["skipped"])
        if features is None:
            continue
        features["row"] = [start + first + place for place in features["row"]]
        if "rows" in features:
            features["rows"] = [[start + first + place for place in several] for several in features["rows"]]
        notes["examples"] += len(features["row"])
        longest = np.array(features.pop("longest", features["length"]))
        notes["longest"] += int(np.count_nonzero(longest >= work.max_length))
        yield table_of(features)


def encode_chunk(
    chunk: dict[str, list[Any]], work: Work, where: Callable[[int], str], skipped: list[str]
) -> dict[str, list[Any]] | None:
    """Return the features of the usable rows of a chunk, with `row` their places in it; None where none is usable.

    The others are added to `skipped` by what `where` makes of their place, or raise `UserError` with it.
    """
    good = _usable(work.encoder, chunk, where, skipped, skip_bad=work.skip_bad)
    if not good:
        return None
    usable = {name: [values[row] for row in good] for name, values in chunk.items()}
    features = work.encoder.encode(usable, work.tokenizer, work.max_length)
    problems = [(good[place], problem) for place, problem in features.pop("unusable", ())]
    _refuse(problems, where, skipped, skip_bad=work.skip_bad)
    places = features.pop("row", range(len(good)))
    if not len(places):
        return None
    if "rows" in features:
        features["rows"] = [[good[place] for place in several] for several in features["rows"]]
    return {"row": [good[place] for place in places], **features}


def _where(rows: Rows, first: int, place: int) -> str:
    return rows.where(first + place)


def _digest(table: pa.Table, digest: hashlib.blake2b) -> pa.Table:
    """Take in the names and values of a table, so that the same examples are known again in any folder or machine."""
    for name in table.column_names:
        if name == REAL:  # the others say it
            continue
        array = table.column(name).combine_chunks()
        digest.update(name.encode())
        if hasattr(array, "offsets"):
            digest.update(array.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            array = array.flatten()
        values = array.to_numpy(zero_copy_only=False)
        digest.update(repr(array.to_pylist()).encode() if values.dtype == object else values.tobytes())
    return table


def _usable(
    encoder: Encoder, chunk: dict[str, list[Any]], where: Callable[[int], str], skipped: list[str], *, skip_bad: bool
) -> list[int]:
    """Return which rows of a chunk can be used; note the others, or raise for them."""
    good, problems = [], []
    names = list(chunk)
    for row, values in enumerate(zip(*chunk.values(), strict=True)):
        problem = encoder.problem(dict(zip(names, values, strict=True)))
        if problem is None:
            good.append(row)
        else:
            problems.append((row, problem))
    _refuse(problems, where, skipped, skip_bad=skip_bad)
    return good


def _refuse(
    problems: Sequence[tuple[int, str]], where: Callable[[int], str], skipped: list[str], *, skip_bad: bool
) -> None:
    """Note rows that cannot be used, or raise for them."""
    lines = [f"{where(row)}: {problem}" for row, problem in problems]
    if lines and not skip_bad:
        more = f" (and {len(lines) - SHOWN} more like this nearby)" if len(lines) > SHOWN else ""
        raise UserError("\n".join(lines[:SHOWN]) + more + "\nMend the rows, or set data.on_bad_row=skip")
    skipped += lines


def _identity(tokenizer: Any) -> str:
    """Everything that a tokenizer's output depends on, without the truncation that its last call left behind."""
    outside = (type(tokenizer).__name__, tokenizer.truncation_side, tokenizer.model_input_names)
    if not hasattr(tokenizer, "backend_tokenizer"):
        return repr((outside, sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map))
    return repr(outside) + _without_cuts(tokenizer.backend_tokenizer.to_str())


@lru_cache(maxsize=1)
def _without_cuts(state: str) -> str:
    """Return a tokenizer's state with neither truncation nor padding. Kept: it takes 0.1 s, and every role asks."""
    return json.dumps({**json.loads(state), "truncation": None, "padding": None}, sort_keys=True)
