"""The training rows of a run that streams them: found, looked at, and made into batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data import pulse
from data.batches import Batches
from data.encode import Encoder, Work
from data.encoded import Encoded
from data.errors import UserError
from data.find_shards import find
from data.first_rows import first_rows
from data.shards import Shard, fingerprint
from data.source import DataConfig, Rows
from data.stream import Kinds, Stream
from data.stream_batches import StreamBatches
from train import together
from train.exchange import exchange


@dataclass(frozen=True)
class Streamed:
    """The sources of data.train: their shards, their first rows, and what these tell of the types of all."""

    shards: list[list[Shard]]
    rows: list[list[Rows]]
    kinds: list[Kinds | None]

    def streams(
        self, data: DataConfig, seed: int, encoder: Encoder, tokenizer: Any, max_length: int
    ) -> Sequence[Stream]:
        """Return the sources as examples. They have the tokenizer to themselves."""
        work = copy.deepcopy(Work(encoder, tokenizer, max_length, data.on_bad_row == "skip"))
        return [
            Stream(number, shards, min(data.readers, len(shards)), data.shuffle_buffer, seed, work, kinds)
            for number, (shards, kinds) in enumerate(zip(self.shards, self.kinds, strict=True))
        ]


def known(first: Encoded, streams: Sequence[Stream]) -> Encoded:
    """Return the encoded first rows marked as such, with the fingerprint of the whole.

    Of shards and settings, of what makes examples of rows, and of the first examples themselves.
    """
    settings = [(stream.readers, stream.block, stream.seed, stream.work.settings) for stream in streams]
    known_as = fingerprint([stream.shards for stream in streams], settings, first.fingerprint)
    return replace(first, partial=True, fingerprint=known_as)


def look(data: DataConfig, token: str | None) -> Streamed:
    """Find the shards of data.train and read the first rows of some. Raises `UserError` for what cannot be streamed."""
    shards = [find(source, "train", token) for source in data.train]
    looked = [
        first_rows(found, f"data.train: {source.path}", skip_bad=data.on_bad_row == "skip")
        for source, found in zip(data.train, shards, strict=True)
    ]
    return Streamed(shards, [rows for rows, _ in looked], [kinds for _, kinds in looked])


def stream_batches(streams: Sequence[Stream], data: DataConfig, batch_size: int, like: Batches) -> StreamBatches:
    """Return the batches of streams; `like` are those of the first rows. Called on all processes.

    Raises `UserError` on all of them unless they have found the same shards.
    """
    weights = [source.weight or 1.0 for source in data.train]
    gather = exchange()
    if len(set(gather(like.fingerprint.encode()))) > 1:
        raise UserError("data.train: the processes do not see the same shards; is something still being written there?")
    pulse.listen(lambda _: together.goes_on())  # what threads read over is a sign of life of this process
    return StreamBatches(streams, weights, batch_size, like.order.seed, like, gather, together.wait)
