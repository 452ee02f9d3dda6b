"""Streams: every row once a pass, the same examples in the same updates in any world and after any stop."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import UserError
from tests.data.streams import Streaming, taken, write

SIZES = [5, 1, 12, 0, 7, 3]


@pytest.mark.parametrize("block", [1, 4, 100])
@pytest.mark.parametrize("readers", [1, 4, 50])
def test_every_row_once_a_pass(tmp_path: Path, encoder: Any, tokenizer: Any, block: int, readers: int) -> None:
    found = Streaming(
        [write(tmp_path, "x", SIZES)], encoder, tokenizer, tmp_path / "cache", block=block, readers=readers
    )
    rows = [one for batch in found.run(0, 16)[0] for one in taken(batch)]
    everything = Counter((0, f"x-{shard:02d}.jsonl", row) for shard, size in enumerate(SIZES) for row in range(size))
    assert len(rows) == 16 * 7 == 4 * sum(SIZES)
    passes = [rows[start : start + sum(SIZES)] for start in range(0, len(rows), sum(SIZES))]
    assert all(Counter(one) == everything for one in passes)
    assert len({tuple(one) for one in passes}) == 4  # each in its own order


def test_one_sequence_for_every_world_and_every_stop(tmp_path: Path, encoder: Any, tokenizer: Any) -> None:
    """Two sources by weight, 40 updates over several passes; 3 campaigns of random stops, each on another world."""
    paths = [write(tmp_path, "x", SIZES), write(tmp_path, "y", [9, 4])]
    found = Streaming(paths, encoder, tokenizer, tmp_path / "cache", weights=[3.0, 1.0])
    whole = found.run(0, 40)[0]
    counts = Counter(source for batch in whole for source, _, _ in taken(batch))
    assert counts == {0: 210, 1: 70}
    for source, size in ((0, sum(SIZES)), (1, 13)):
        rows = [one for batch in whole for one in taken(batch) if one[0] == source]
        for start in range(0, len(rows) - size + 1, size):
            assert len(set(rows[start : start + size])) == size
    assert len({example for batch in whole for example in batch.examples.tolist()}) == 280
    for world in (2, 7):
        shares = found.run(0, 40, world=world)
        for number, batch in enumerate(whole):
            for share in shares:
                assert np.array_equal(share[number].examples, batch.examples)
                assert share[number].position == batch.position
                assert (share[number].targets, share[number].tokens) == (batch.targets, batch.tokens)
            parts = [part for share in shares for part in share[number].parts]
            rows = np.concatenate([part.rows for part in parts if not part.filler])
            assert sorted(rows.tolist()) == list(range(7))
            assert len({len(share[number].parts) for share in shares}) == 1
    generator = np.random.default_rng(0)
    for _ in range(3):
        done, position, seen = 0, None, []
        while done < 40:
            world, until = int(generator.choice([1, 2, 3])), min(40, done + int(generator.integers(1, 12)))
            # a killed run has read on, and its last checkpoint is older
            batches = found.run(done, min(40, until + int(generator.integers(0, 3))), position, world)[0]
            seen += batches[: until - done]
            done, position = until, json.loads(json.dumps(seen[-1].position))
        assert [taken(batch) for batch in seen] == [taken(batch) for batch in whole]


def test_bad_rows(tmp_path: Path, encoder: Any, tokenizer: Any) -> None:
    """Named with shard and place, on all processes; or skipped, and told exactly once, also after a stop."""
    path = write(tmp_path, "x", [300, 300, 20])
    file = tmp_path / "x-01.jsonl"
    lines = file.read_text().splitlines()
    lines[270], lines[280], lines[290] = '{"text": "bad", "label": 1}', "{torn", '{"text": 5, "label": 1}'
    file.write_text("\n".join(lines))
    found = Streaming([path], encoder, tokenizer, tmp_path / "cache", batch_size=40, block=50)
    with pytest.raises(UserError, match=r"x-01.jsonl, line 281: malformed JSON"):
        found.run(0, 20, world=2)
    found = Streaming([path], encoder, tokenizer, tmp_path / "cache", batch_size=40, block=50, skip_bad=True)
    whole = found.run(0, 15)[0]
    told = [line for batch in whole for line in batch.skipped]
    assert sorted(told) == [
        "x-01.jsonl, line 271: 'text' is bad",
        "x-01.jsonl, line 281: malformed JSON (Expecting property name enclosed in double quotes at column 2)",
        "x-01.jsonl, line 291: 'text' holds a number ('5') where earlier rows hold text",
    ]
    assert len({one for batch in whole for one in taken(batch)}) == 600
    for stop in range(1, 15):
        again = [*whole[:stop], *found.run(stop, 15, whole[stop - 1].position, world=2)[0]]
        assert sorted(line for batch in again for line in batch.skipped) == sorted(told)


def test_a_source_without_usable_rows(tmp_path: Path, encoder: Any, tokenizer: Any) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "bad", "label": 1}\n' * 20)
    with pytest.raises(UserError, match="no usable rows"):
        Streaming([str(tmp_path / "x.jsonl")], encoder, tokenizer, tmp_path / "cache", skip_bad=True)
