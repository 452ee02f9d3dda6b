"""Streams of small shards, and several processes of one in threads of this one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.batches import Batches, Position
from data.collate import mask, pad
from data.encode import Work, encode_sources
from data.find_shards import find
from data.first_rows import first_rows
from data.order import Order
from data.plan import Bounds
from data.source import Source
from data.stream import Stream
from data.stream_batches import StreamBatches

if TYPE_CHECKING:
    from torch import Tensor

Taken = tuple[int, str, int]
"""(source, shard, row)."""


def collate(features: Any) -> dict[str, Tensor]:
    return {"input_ids": pad(features["input_ids"], 0), "attention_mask": mask(features["input_ids"])}


def count(features: Any) -> int:
    return int(features["targets"].sum())


def write(folder: Path, name: str, sizes: Sequence[int]) -> str:
    """Write a jsonl shard of each size; return the glob that finds them."""
    folder.mkdir(exist_ok=True)
    for shard, size in enumerate(sizes):
        lines = [json.dumps({"text": "ab" * (1 + row % 5), "label": row}) for row in range(size)]
        (folder / f"{name}-{shard:02d}.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(folder / f"{name}-*.jsonl")


class Streaming:
    """What a test says of a stream once, for any number of processes."""

    def __init__(self, paths: Sequence[str], encoder: Any, tokenizer: Any, cache: Path, **settings: Any) -> None:
        """Settings: readers, block, batch_size, weights, skip_bad."""
        self.paths = paths
        self.encoder, self.tokenizer, self.cache = encoder, tokenizer, cache
        self.readers, self.block = settings.get("readers", 4), settings.get("block", 3)
        self.batch_size, self.weights = settings.get("batch_size", 7), settings.get("weights", [1.0] * len(paths))
        self.skip_bad = settings.get("skip_bad", False)
        self.shards = [find(Source(path=path), "train", None) for path in paths]
        self.looked = [first_rows(shards, "data.train", skip_bad=self.skip_bad) for shards in self.shards]
        rows = [rows for rows, _ in self.looked]
        self.first = encode_sources(rows, encoder, tokenizer, 16, skip_bad=self.skip_bad, cache=cache)

    def batches(self, world: int, process: int, gather: Callable[[bytes], list[bytes]]) -> StreamBatches:
        work = Work(self.encoder, self.tokenizer, 16, self.skip_bad)
        streams = [
            Stream(number, shards, min(self.readers, len(shards)), self.block, 3, work, kinds)
            for number, (shards, (_, kinds)) in enumerate(zip(self.shards, self.looked, strict=True))
        ]
        order = Order(self.first.sizes, self.first.sizes, self.batch_size, 3)
        like = Batches(self.first, order, Bounds(tokens=60, overhead=5), collate, count, world, process)
        return StreamBatches(streams, self.weights, self.batch_size, 3, like, gather)

    def run(self, done: int, updates: int, position: Position = None, world: int = 1) -> list[list[Any]]:
        """Return the batches that each process sees."""
        barrier, said = threading.Barrier(world, timeout=60), [b""] * world

        def one(process: int) -> list[Any]:
            def gather(mine: bytes) -> list[bytes]:
                said[process] = mine
                barrier.wait()
                everything = list(said)
                barrier.wait()
                return everything

            return [batch for _, batch in self.batches(world, process, gather).between(done, updates, position)]

        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(one, range(world)))


def taken(batch: Any) -> list[Taken]:
    """Return where the examples of a batch come from, in order."""
    places = batch.places()
    sources = places.get("sources", [0] * len(places["rows"]))
    return list(zip(sources, places["shards"], places["rows"], strict=True))
