"""Batches: a function of the update's number; the processes' parts make up the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

import data.encoded
from data import reader
from data.batches import Batches
from data.collate import mask, pad
from data.encoded import Encoded, Features
from data.order import Order, shares
from data.plan import Bounds
from data.source import Rows
from data.tables import table_of
from data.windows import grouped

if TYPE_CHECKING:
    from torch import Tensor


def collate(features: Features) -> dict[str, Tensor]:
    import torch

    ids = features["input_ids"]
    return {"input_ids": pad(ids, 0), "attention_mask": mask(ids), "row": torch.tensor(features["row"])}


def count(features: Any) -> int:
    return int(features["targets"].sum())


@pytest.fixture
def encoded(encode: Callable[..., Encoded], read: Callable[..., list[Rows]], tmp_path: Path) -> Encoded:
    lines = [json.dumps({"text": "ab"[number % 2] * (1 + number * 7 % 13), "label": 0}) for number in range(50)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    return encode(read(tmp_path / "x.jsonl"))


def build(encoded: Encoded, batch_size: int = 16, **settings: Any) -> Batches:
    order = Order(encoded.sizes, shares(list(encoded.sizes), [None]), batch_size, 3)
    return Batches(encoded, order, settings.pop("bounds", Bounds(tokens=60, overhead=5)), collate, count, **settings)


WINDOWS = pytest.mark.parametrize("window", [None, 2])


@WINDOWS
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("update", [1, 4, 5])
def test_the_parts_of_all_processes_make_up_the_batch(
    encoded: Encoded, world: int, update: int, window: int | None
) -> None:
    order = build(encoded).order
    whole = grouped(order, update, window, encoded.lengths) if window else order.examples(update)
    found = []
    batches = [build(encoded, world=world, process=process, window=window).batch(update) for process in range(world)]
    assert len({len(batch.parts) for batch in batches}) == 1
    taken = sum(part.tensors["input_ids"].numel() for batch in batches for part in batch.parts)
    for batch in batches:
        assert np.array_equal(batch.examples, whole)
        assert batch.targets == len(whole)
        assert batch.tokens == encoded.features(whole)["length"].sum()
        assert batch.computed == taken
        for part in batch.parts:
            assert part.tensors["row"].tolist() == part.examples.tolist()
            lengths = encoded.features(part.examples)["length"]
            assert part.tensors["attention_mask"].sum(1).tolist() == lengths.tolist()
            assert part.tensors["input_ids"].shape == (len(lengths), lengths.max())
            found += part.examples.tolist() if not part.filler else []
    assert sorted(found) == sorted(whole.tolist())


@WINDOWS
def test_the_last_batch_of_an_epoch_is_the_rest(encoded: Encoded, window: int | None) -> None:
    batches = build(encoded, window=window)
    sizes = [len(batch.examples) for _, batch in batches.between(0, 8)]
    assert sizes == [16, 16, 16, 2] * 2
    assert [batches.examples_until(update) for update in range(9)] == np.cumsum([0, *sizes]).tolist()


@WINDOWS
def test_a_batch_is_a_function_of_its_number(encoded: Encoded, window: int | None) -> None:
    batches = build(encoded, window=window)
    all_of_them = dict(batches.between(0, 6))
    assert list(all_of_them) == [1, 2, 3, 4, 5, 6]
    for number, batch in batches.between(3, 6):
        assert np.array_equal(batch.examples, all_of_them[number].examples)
        for part, same in zip(batch.parts, all_of_them[number].parts, strict=True):
            assert all(part.tensors[name].equal(same.tensors[name]) for name in part.tensors)
    assert list(batches.between(6, 6)) == []


@WINDOWS
@pytest.mark.parametrize("together", [1, 33, 1000])
@pytest.mark.parametrize("asked", [False, True])
def test_what_is_read_with_a_batch_does_not_change_it(
    encoded: Encoded, window: int | None, together: int, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, two updates at a time, a whole epoch at a time; asked for ahead or not; in any order, and over the ends of
    epochs."""
    expected = {update: build(encoded, window=window).batch(update) for update in range(1, 10)}
    monkeypatch.setattr(reader, "TOGETHER", together)
    monkeypatch.setattr(data.encoded, "ASKED", 0 if asked else 2**40)
    fresh = replace(encoded)
    assert fresh.asked == asked
    batches = build(fresh, window=window)
    for update in (1, 2, 3, 4, 5, 6, 9, 2, 8, 7, 1):
        found, alone = batches.batch(update), expected[update]
        assert found.examples.tolist() == alone.examples.tolist()
        assert found.places() == alone.places()
        assert found.recut().places() == alone.places()
        for part, same in zip(found.parts, alone.parts, strict=True):
            assert all(part.tensors[name].equal(same.tensors[name]) for name in same.tensors)


@WINDOWS
def test_rows_without_any_token_are_asked_for(
    window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a read of a single one nothing lies anywhere."""
    monkeypatch.setattr(data.encoded, "ASKED", 0)
    monkeypatch.setattr(reader, "TOGETHER", 1)
    whole = table_of({"row": [*range(4)], "input_ids": [[], [], [1], []], "length": [1] * 4, "targets": [1] * 4})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    empty = Encoded(Dataset.from_file(str(tmp_path / "a.arrow")), (4,), (), 0, "")
    found = [list(batch.examples) for _, batch in build(empty, batch_size=1, window=window).between(0, 4)]
    assert sorted(found) == [[0], [1], [2], [3]]


def test_the_cut_does_not_change_the_examples(encoded: Encoded) -> None:
    cuts = [Bounds(rows=3), Bounds(tokens=30), Bounds()]
    taken = [build(encoded, bounds=bounds).batch(2).examples.tolist() for bounds in cuts]
    assert taken[0] == taken[1] == taken[2]
    assert max(len(part.examples) for part in build(encoded, bounds=Bounds(rows=3)).batch(2).parts) <= 3


@WINDOWS
@pytest.mark.parametrize("world", [1, 2])
def test_padding_efficiency_is_that_of_the_batches(encoded: Encoded, world: int, window: int | None) -> None:
    batches = build(encoded, world=world, window=window)
    epoch = [batch for _, batch in batches.between(0, batches.order.updates_per_epoch)]
    real, computed = sum(batch.tokens for batch in epoch), sum(batch.computed for batch in epoch)
    assert batches.padding_efficiency() == pytest.approx(real / computed)
    assert 0.5 < batches.padding_efficiency(sample=2) <= 1


@pytest.mark.parametrize("world", [1, 2])
def test_tokens_are_real_where_a_length_counts_what_is_filled_up(encoded: Encoded, world: int) -> None:
    """Of examples that are several sequences; the plan is of what is computed, and the fingerprint is the same."""
    real = encoded.column("length") // 2 + 1
    several = replace(encoded, dataset=encoded.dataset.add_column("real_tokens", real.tolist()))
    both = (build(each, world=world).between(0, 3) for each in (encoded, several))
    for before, after in zip(*both, strict=True):
        assert after[1].tokens == int(real[after[1].examples].sum()) < before[1].tokens
        assert after[1].computed == before[1].computed and after[1].lengths.tolist() == before[1].lengths.tolist()
    shares = build(several).padding_efficiency() / build(encoded).padding_efficiency()
    assert shares == pytest.approx(real.sum() / encoded.column("length").sum())


@pytest.mark.parametrize("world", [1, 2])
def test_where_no_padding_is_computed_real_tokens_are_shared_out(encoded: Encoded, world: int) -> None:
    """Of examples that are several sequences too: bounds, work and what is told of it are in real tokens."""
    real = np.random.default_rng(0).permutation(encoded.column("length"))  # long where `length` is not
    several = replace(encoded, dataset=encoded.dataset.add_column("real_tokens", real.tolist()))
    batches = build(several, world=world, bounds=Bounds(tokens=30, overhead=1000, padding_free=True))
    for _, batch in batches.between(0, 3):
        assert batch.lengths.tolist() == real[batch.examples].tolist()
        assert all(real[part.examples].sum() <= 30 or len(part.examples) == 1 for part in batch.parts)
        fillers = batch.computed - batch.tokens
        assert fillers == 0 or (world > 1 and fillers <= world * real.max())
    assert batches.padding_efficiency() >= (1 if world == 1 else 0.8)


def test_windows_bring_examples_of_similar_length_together(encoded: Encoded) -> None:
    plain, windows = (build(encoded, batch_size=8, bounds=Bounds(overhead=1000), window=window) for window in (None, 6))
    spread = [sum(np.ptp(batch.lengths) for _, batch in batches.between(0, 6)) for batches in (plain, windows)]
    assert spread[1] < 0.4 * spread[0]
    assert windows.padding_efficiency() > plain.padding_efficiency() + 0.2
    assert str(plain) == "7 an epoch"
    assert str(windows) == "7 an epoch, of similar length within windows of 6 updates"


def test_pad_and_mask() -> None:
    sequences = [np.array([7, 8, 9]), np.array([5], dtype=np.int32)]
    assert pad(sequences, 1).tolist() == [[7, 8, 9], [5, 1, 1]]
    assert pad(sequences, 1, left=True).tolist() == [[7, 8, 9], [1, 1, 5]]
    assert mask(sequences).tolist() == [[1, 1, 1], [1, 0, 0]]
    assert mask(sequences, left=True).tolist() == [[1, 1, 1], [0, 0, 1]]
    assert str(pad(sequences, 1).dtype) == "torch.int64"


def test_keys_depend_on_seed_epoch_and_example_alone(encoded: Encoded) -> None:
    seen: dict[int, dict[int, int]] = {0: {}, 1: {}}

    def note(features: Any) -> int:
        seen[epoch].update(zip(features["row"].tolist(), features["key"].tolist(), strict=True))
        return 1

    batches = replace(build(encoded), count=note)
    for update in range(1, 9):
        epoch = (update - 1) // batches.order.updates_per_epoch
        batches.batch(update)
    again = dict(seen[1])
    batches = replace(batches, order=replace(batches.order, batch_size=50))  # an epoch is one update, in other company
    for update in (2,):
        epoch = 1
        batches.batch(update)
    assert len(seen[0]) == len(seen[1]) == 50
    assert seen[1] == again
    assert not set(seen[0].values()) & set(seen[1].values()) and len(set(seen[0].values())) == 50
