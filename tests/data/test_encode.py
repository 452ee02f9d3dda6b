"""Encoding: once for each content, whole or not at all, with bad rows named or listed."""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from data import tables
from data.encoded import Encoded, take
from data.errors import UserError
from data.source import Rows, named
from tests.data.conftest import FakeEncoder

Encode = Callable[..., Encoded]
Read = Callable[..., list[Rows]]


def write(file: Path, *texts: str) -> Path:
    file.write_text(
        "".join(json.dumps({"text": text, "label": number % 2}) + "\n" for number, text in enumerate(texts))
    )
    return file


def kept_files(folder: Path) -> list[Path]:
    return [file for file in (folder / "cache" / "encoded").glob("*") if file.suffix != ".lock"]


def test_features_come_in_the_order_asked_for_across_files(encode: Encode, read: Read, tmp_path: Path) -> None:
    write(tmp_path / "a1.jsonl", *["a" * n for n in range(1, 6)])
    write(tmp_path / "a2.jsonl", *["b" * n for n in range(1, 4)])
    write(tmp_path / "c.jsonl", *["c" * n for n in range(1, 8)])
    encoded = encode(read(tmp_path / "a*.jsonl"), read(tmp_path / "c.jsonl"))
    assert encoded.sizes == (8, 7)
    assert len(encoded.dataset) == 15
    ids = np.array([14, 0, 7, 5, 8, 0])
    features = encoded.features(ids)
    assert features["length"].tolist() == [9, 3, 5, 3, 3, 3]
    assert features["label"].tolist() == [0, 0, 0, 0, 0, 0]
    assert features["row"].tolist() == [6, 0, 7, 5, 0, 0]  # the place in its source, across its files
    assert [len(tokens) for tokens in features["input_ids"]] == [9, 3, 5, 3, 3, 3]
    assert features["input_ids"][1].tolist() == [2, 5, 3]
    assert encoded.column("row").tolist() == [*range(8), *range(7)]
    assert encoded.column("targets").sum() == 15
    assert encoded.dataset.cache_files  # memory-mapped


@pytest.mark.parametrize(("size", "chunks"), [(1, 25), (800_000, 2), (tables.GROUP, 1)])
def test_features_over_many_chunks(
    encode: Encode, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, chunks: int
) -> None:
    monkeypatch.setattr(tables, "GROUP", size)
    write(tmp_path / "x.jsonl", *["a" * (1 + number % 9) for number in range(25_000)])
    encoded = encode(read(tmp_path / "x.jsonl"))
    assert len(encoded.dataset.data.column("row").chunks) == chunks  # few, for opening costs time for each
    ids = np.random.default_rng(0).integers(0, 25_000, 200)
    assert encoded.lengths(ids).tolist() == (3 + ids % 9).tolist()
    assert encoded.features(ids)["length"].tolist() == (3 + ids % 9).tolist()
    assert encoded.features(ids)["row"].tolist() == ids.tolist()


def test_columns_beside_come_with_the_others(encode: Encode, read: Read, tmp_path: Path) -> None:
    encoded = encode(read(write(tmp_path / "x.jsonl", "a", "bb", "ccc")))
    values = np.arange(6.0).reshape(3, 2)
    features = replace(encoded, beside={"known": values}).features(np.array([2, 0]))
    assert features["length"].tolist() == [5, 3] and features["known"].tolist() == [[4, 5], [0, 1]]
    assert take(features, np.array([1]))["known"].tolist() == [[0, 1]]
    assert "known" not in encoded.features(np.array([0]))


def test_take_chooses_rows_in_order(encode: Encode, read: Read, tmp_path: Path) -> None:
    features = encode(read(write(tmp_path / "x.jsonl", "a", "bb", "ccc"))).features(np.arange(3))
    chosen = take(features, np.array([2, 0]))
    assert chosen["length"].tolist() == [5, 3]
    assert [len(tokens) for tokens in chosen["input_ids"]] == [5, 3]


def test_columns_are_small(encode: Encode, read: Read, tmp_path: Path) -> None:
    types = {name: str(feature.dtype) for name, feature in encode(
        read(write(tmp_path / "x.jsonl", "a", "b"))).dataset.features.items() if name != "input_ids"}  # fmt: skip
    assert types == {"row": "int64", "label": "int32", "length": "int32", "targets": "int32"}


def test_the_second_time_nothing_is_encoded(
    encode: Encode, read: Read, tmp_path: Path, encoder: FakeEncoder, tokenizer: Any
) -> None:
    write(tmp_path / "x.jsonl", *["ab"] * 2500)
    first = encode(read(tmp_path / "x.jsonl"))
    assert encoder.calls == [1000, 1000, 500]
    tokenizer("what an earlier call left behind", truncation=True, max_length=3)
    second = encode(read(tmp_path / "x.jsonl"), encoder=FakeEncoder())
    assert len(encoder.calls) == 3
    assert second.fingerprint == first.fingerprint
    assert len(kept_files(tmp_path)) == 2  # data and notes


@pytest.mark.parametrize("change", ["identity", "tokenizer", "side", "max_length", "skip_bad", "file", "encoder"])
def test_what_changes_the_result_is_encoded_again(
    encode: Encode, read: Read, tmp_path: Path, encoder: FakeEncoder, new_tokenizer: Any, change: str
) -> None:
    class Other(FakeEncoder):
        pass

    write(tmp_path / "x.jsonl", "ab" * 20, "cd")
    before = encode(read(tmp_path / "x.jsonl"))
    again = Other() if change == "encoder" else FakeEncoder()
    changes: dict[str, Any] = {"encoder": again}
    if change == "identity":
        again.identity = "another"
    elif change == "tokenizer":
        changes["tokenizer"] = new_tokenizer("abc")
    elif change == "side":
        changes["tokenizer"] = new_tokenizer(truncation_side="left")
    elif change == "max_length":
        changes["max_length"] = 8
    elif change == "skip_bad":
        changes["skip_bad"] = True
    elif change == "file":
        write(tmp_path / "x.jsonl", "new" * 20, "cd")
    after = encode(read(tmp_path / "x.jsonl"), **changes)
    assert len(again.calls) == 1
    assert (after.fingerprint == before.fingerprint) == (change in ("identity", "skip_bad", "encoder"))


def test_a_task_whose_code_changed_is_encoded_again(encode: Encode, read: Read, tmp_path: Path) -> None:
    code = """
        class Task:
            columns = ("text", "label")
            identity = "same"

            def problem(self, row):
                return None

            def encode(self, rows, tokenizer, max_length):
                return {name: [number() for _ in rows["text"]] for name in ("length", "targets")}


        def number():
            return 1
    """
    file = tmp_path / "task_in_a_file.py"
    lengths = []
    for text in (code, code.replace("return 1", "return 2  # outside of the class")):
        file.write_text(textwrap.dedent(text))
        spec = importlib.util.spec_from_file_location("task_in_a_file", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["task_in_a_file"] = module
        spec.loader.exec_module(module)
        encoded = encode(read(write(tmp_path / "x.jsonl", "a")), encoder=module.Task())
        lengths.append(int(encoded.column("length")[0]))
    del sys.modules["task_in_a_file"]
    assert lengths == [1, 2]


def test_the_fingerprint_is_of_the_examples_not_of_the_place(encode: Encode, read: Read, tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", "a", "b")
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "y.jsonl", "a", "b")
    write(tmp_path / "z.jsonl", "b", "a")
    first = encode(read(tmp_path / "x.jsonl"))
    moved = encode(read(tmp_path / "elsewhere" / "y.jsonl"), cache=tmp_path / "other cache")
    assert moved.fingerprint == first.fingerprint
    assert encode(read(tmp_path / "z.jsonl")).fingerprint != first.fingerprint


def test_problems_name_file_and_row(encode: Encode, read: Read, tmp_path: Path, encoder: FakeEncoder) -> None:
    rows = read(write(tmp_path / "x.jsonl", "a", "bad", *"bc", *["bad"] * 7))
    with pytest.raises(UserError) as raised:
        encode(rows)
    lines = str(raised.value).splitlines()
    assert lines[0] == "x.jsonl, line 2: 'text' is bad"
    assert lines[1] == "x.jsonl, line 5: 'text' is bad"
    assert lines[4].endswith("(and 3 more like this nearby)")
    assert "data.on_bad_row=skip" in lines[5]
    assert encoder.calls == []
    assert kept_files(tmp_path) == []


def test_problems_of_parquet_name_the_row(encode: Encode, read: Read, tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", "bad"], "label": [0, 1]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet, row 1 \(from 0\): 'text' is bad"):
        encode(read(tmp_path / "x.parquet"))


def test_skipped_rows_are_listed_also_from_the_cache(encode: Encode, read: Read, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        '{"text": "a", "label": 0}\n{\n{"text": "bad", "label": 0}\n{"text": "b", "label": 1}\n'
    )
    write(tmp_path / "y.jsonl", "bad", "bad")
    for _ in range(2):
        encoded = encode(read(tmp_path / "[xy].jsonl", skip_bad=True), skip_bad=True)
        assert [note.split(":")[0] for note in encoded.skipped] == [
            "x.jsonl, line 2", "x.jsonl, line 3", "y.jsonl, line 1", "y.jsonl, line 2",
        ]  # fmt: skip
        assert encoded.sizes == (2,)
        assert encoded.column("row").tolist() == [0, 2]


def test_rows_of_which_only_the_tokens_show_that_they_cannot_be_used(
    encode: Encode, read: Read, tmp_path: Path
) -> None:
    class Windows(FakeEncoder):
        def encode(self, rows: Any, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
            features, short = super().encode(rows, tokenizer, max_length), []
            for place, length in enumerate(features["length"]):
                short += [place] * (2 if length < max_length else 0)  # two windows of each row that fits
            unusable = [(place, "too long") for place in range(len(rows["text"])) if place not in short]
            return {**{name: [values[place] for place in short] for name, values in features.items()},
                    "row": short, "unusable": unusable}  # fmt: skip

    rows = read(write(tmp_path / "x.jsonl", "a", "bad", "b" * 20, "c", "d" * 20))
    with pytest.raises(UserError, match=r"line 2: 'text' is bad\nMend the rows"):
        encode(rows, encoder=Windows())
    mended = read(write(tmp_path / "y.jsonl", "a", "b" * 20, "c", "d" * 20))
    with pytest.raises(UserError, match=r"y.jsonl, line 2: too long\ny.jsonl, line 4: too long\nMend the rows, or"):
        encode(mended, encoder=Windows())
    for _ in range(2):
        encoded = encode(rows, encoder=Windows(), skip_bad=True)
        assert encoded.column("row").tolist() == [0, 0, 3, 3]
        assert [note[:16] for note in encoded.skipped] == ["x.jsonl, line 2:", "x.jsonl, line 3:", "x.jsonl, line 5:"]
    with pytest.raises(UserError, match="no usable rows; 1 were skipped"):
        encode(read(write(tmp_path / "z.jsonl", "b" * 20)), encoder=Windows(), skip_bad=True)


def test_a_source_without_usable_rows(encode: Encode, read: Read, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.jsonl: no usable rows; 2 were skipped, the first: x\.jsonl, line 1: 'tex"):
        encode(read(write(tmp_path / "x.jsonl", "bad", "bad")), skip_bad=True)


def test_chunks_without_a_usable_row(encode: Encode, read: Read, tmp_path: Path) -> None:
    rows = read(write(tmp_path / "x.jsonl", *["bad"] * 1000, "a", *["bad"] * 1500, "bb"))
    encoded = encode(rows, skip_bad=True)
    assert encoded.column("row").tolist() == [1000, 2501]
    assert len(encoded.skipped) == 2500


def test_lists_that_are_all_empty_in_a_chunk(encode: Encode, read: Read, tmp_path: Path) -> None:
    class Multi(FakeEncoder):
        def encode(self, rows: Any, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
            labels: list[list[int]] = [[] if text == "a" else [1] for text in rows["text"]]
            return {"label": labels, "length": [1] * len(labels), "targets": [3] * len(labels)}

    encoded = encode(read(write(tmp_path / "x.jsonl", *["a"] * 1500, "b")), encoder=Multi())
    assert [labels.tolist() for labels in encoded.features(np.array([1500, 0]))["label"]] == [[1], []]


def test_class_labels_come_by_name(read: Read, tmp_path: Path) -> None:
    """Files may number the same labels differently, so a task is given names; -1 is a missing label."""
    for file, names in (("x.parquet", ["no", "yes"]), ("y.parquet", ["yes", "no"])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        rows = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / file)
    found = [named(rows.dataset[:], rows.dataset.features)["label"] for rows in read(tmp_path / "*.parquet")]
    assert found == [["yes", "no", None], ["no", "yes", None]]


def test_longest_counts_examples_that_reach_max_length(encode: Encode, read: Read, tmp_path: Path) -> None:
    encoded = encode(read(write(tmp_path / "x.jsonl", "a" * 5, "a" * 6, "a" * 50)), max_length=8)
    assert encoded.column("length").tolist() == [7, 8, 8]
    assert encoded.longest == 2


def test_an_encoder_that_raises_leaves_nothing(encode: Encode, read: Read, tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", *["a"] * 1500, "boom")
    with pytest.raises(RuntimeError, match="boom"):
        encode(read(tmp_path / "x.jsonl"))
    assert kept_files(tmp_path) == []


@pytest.mark.parametrize("damage", ["truncated", "a chunk short", "emptied", "notes lost", "notes nonsense"])
def test_a_damaged_cache_is_encoded_again(encode: Encode, read: Read, tmp_path: Path, damage: str) -> None:
    write(tmp_path / "x.jsonl", *["ab"] * 2500)
    before = encode(read(tmp_path / "x.jsonl"))
    ids = np.array([2499, 3])
    expected = before.features(ids)["length"].tolist()
    (arrow,) = (tmp_path / "cache" / "encoded").glob("*.arrow")
    notes = arrow.with_suffix(".json")
    size = arrow.stat().st_size
    if damage == "notes lost":
        notes.unlink()
    elif damage == "notes nonsense":
        notes.write_text('{"rows": 25')
    else:
        with arrow.open("r+b") as stream:
            stream.truncate({"truncated": size // 2, "a chunk short": size - 8, "emptied": 0}[damage])
    again = FakeEncoder()
    after = encode(read(tmp_path / "x.jsonl"), encoder=again)
    assert len(again.calls) == 3
    assert after.features(ids)["length"].tolist() == expected
    assert after.fingerprint == before.fingerprint
